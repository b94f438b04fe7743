"""What `fastalign generate` and `fastalign eval` share: a model on its device, and its samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastalign.data import PromptDataset, Tokenizer, eos_token_ids, load_prompts, load_tokenizer
from fastalign.models import find_device, load_policy
from fastalign.rollouts import Completion, SamplingParams, TransformersSampler


@dataclass(frozen=True)
class SampledModel:
    """The model that is sampled from."""

    path: str
    """Folder in transformers' layout, or a hub name."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU if there is one."""


@dataclass(frozen=True)
class SamplingRun:
    """Randomness."""

    seed: int = 0
    """Of the samples; the same seed draws the same tokens, however they are batched."""


def load_sampled(config: SampledModel) -> tuple[Any, Tokenizer]:
    """The model, in float32 on a CPU and bfloat16 on a GPU, and its tokenizer."""
    device = find_device(config.device, "model.device")
    tokenizer = load_tokenizer(config.path, trust_remote_code=config.trust_remote_code)
    model = load_policy(
        config.path,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        device=device,
        packing="padded",
        trust_remote_code=config.trust_remote_code,
    )
    return model, tokenizer


def read_prompts(
    source: str, model: Any, tokenizer: Tokenizer, params: SamplingParams
) -> PromptDataset:
    """Prompts that leave room for their answers.

    Raises:
        ValueError: a bad row, or a prompt that is too long.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or 2**31
    room = limit - params.max_new_tokens
    if room < 1:
        raise ValueError(
            f"sampling.max-new-tokens: the model has {limit} positions, got {params.max_new_tokens}"
        )
    return load_prompts(source, tokenizer, max_length=room)


def sample(
    config: SampledModel,
    model: Any,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[Sequence[int]],
    params: SamplingParams,
    seed: int,
) -> list[list[Completion]]:
    """Completions of each prompt; says now and then how many are done."""
    total, done, shown = len(prompt_ids) * params.num_samples, 0, 0

    def progress(count: int) -> None:
        nonlocal done, shown
        done += count
        if done == total or done - shown >= total / 5:
            shown = done
            print(f"sampled {done} of {total}", flush=True)

    stops = eos_token_ids(tokenizer, config.path)
    sampler = TransformersSampler(
        model,
        eos_token_ids=stops,
        pad_token_id=stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        on_progress=progress,
    )
    try:
        return sampler.generate(prompt_ids, params, seed=seed)
    finally:
        sampler.close()


def new_file(out: str) -> Path:
    """The path to write, its folder made.

    Raises:
        ValueError: it exists: nothing is overwritten.
    """
    path = Path(out)
    if path.exists():
        raise ValueError(f"out: {path} exists; remove it or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
