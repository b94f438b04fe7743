"""What an engine is built for, whichever process it runs in, and how its answers are read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fastalign.rollouts.engines.options import VllmOptions
from fastalign.rollouts.engines.params import check_params
from fastalign.rollouts.engines.weights import Shapes, shapes_of_config
from fastalign.rollouts.sampler import Completion, SamplerFailed, SamplingParams, check_prompts


@dataclass(frozen=True)
class EngineSpec:
    """A model as an engine is to run it.

    Attributes:
        config: of the model, from transformers.
        eos_token_ids: tokens that end a completion; no other token does.
        dtype: of the engine's weights and products.
        max_length: most tokens of a prompt with its completion; None: the model's positions.
        options: of the engine.
        lora_rank: of the adapters it will be given; 0: none.
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
        positions = getattr(self.config, "max_position_embeddings", None)
        return min(n for n in (self.max_length, positions, 2**31) if n is not None)

    def check(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams) -> None:
        """Refuses what the engine could not answer, or would change.

        Raises:
            ValueError: see `check_prompts` and `check_params`.
        """
        check_prompts(prompt_ids, params, self.limit, self.config.get_text_config().vocab_size)
        check_params(params)


def read_completion(
    token_ids: Sequence[int],
    logprobs: Sequence[float | None],
    finish_reason: str | None,
    params: SamplingParams,
    version: int,
) -> Completion:
    """An engine's answer, if it is one.

    Raises:
        SamplerFailed: it was broken off, or a log-prob is not finite.
    """
    if finish_reason not in ("stop", "length"):
        raise SamplerFailed(f"sampler: a request ended with {finish_reason!r}")
    usable = [x for x in logprobs if x is not None and math.isfinite(x)]
    if len(usable) != len(token_ids):
        raise SamplerFailed("sampler: a log-prob is not finite")
    if params.temperature == 0:  # what is drawn without chance has log-prob 0
        usable = [0.0] * len(usable)
    return Completion(list(token_ids), usable, finish_reason, version)  # type: ignore[arg-type]
