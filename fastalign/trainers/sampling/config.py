"""Settings of the algorithms that sample: `--data.*`, `--reward.*`, `--watch.*`."""

import math
from dataclasses import dataclass, field
from typing import Literal

from fastalign.data_sources import checked_sources
from fastalign.in_memory import NOT_GIVEN, is_given
from fastalign.rollouts.engines.options import SamplerName, VllmOptions
from fastalign.rollouts.sampler import SamplingParams
from fastalign.runs.config import TrainingConfig, require, within


@dataclass(frozen=True)
class FrozenReferenceConfig:
    """The frozen reference model that the policy is kept close to; the base under an adapter."""

    path: str | None = None
    """Folder or hub name; by default the model that training starts from."""


@dataclass(frozen=True)
class WatchConfig:
    """Limits beyond which a policy counts as collapsed, which is printed and logged."""

    stop: bool = False
    """Save and end the run with exit code 3 after `patience` consecutive violating steps."""
    patience: int = 3
    """Number of consecutive violating steps that watch.stop waits for."""
    min_entropy: float = 0.05
    """Minimum mean entropy in nats per token."""
    min_length: float = 1.5
    """Minimum mean completion length in tokens, EOS included."""
    max_unfinished: float = 0.95
    """Maximum share of completions without an EOS."""
    max_repeated: float = 0.5
    """Maximum share of completions in which most four-token sequences are repeats."""
    max_kl: float = 100.0
    """Maximum mean KL of a response to the reference in nats."""

    def __post_init__(self) -> None:
        within("watch.patience", self.patience, 1)
        for name in ("min_entropy", "min_length", "max_kl"):
            within(f"watch.{name}", getattr(self, name), 0)
        for name in ("max_unfinished", "max_repeated"):
            within(f"watch.{name}", getattr(self, name), 0, 1)


@dataclass(frozen=True)
class PromptDataConfig:
    """The prompts and the handling of rows that do not fit."""

    train: str | tuple[str, ...] = field(
        default=NOT_GIVEN, metadata={"metavar": "SOURCE[:WEIGHT] ..."}
    )
    """Training prompts: files, folders or hub names with a `prompt` column; with a weight behind
    it, `a.jsonl:2` or `a.jsonl:0.5`, an epoch has each of a source's prompts so many times."""
    eval: str | None = None
    """Held-out prompts with the same column."""
    max_length: int = 512
    """Maximum number of tokens of a prompt, without its answers."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a row that cannot be used (error), or skip and count it."""
    on_too_long: Literal["error", "skip"] = "error"
    """Stop at a prompt longer than max_length or with no room for an answer, or skip it."""

    def __post_init__(self) -> None:
        if is_given(self.train):
            object.__setattr__(self, "train", checked_sources(self.train))
        require(self.max_length >= 1, "data.max_length", "at least 1", self.max_length)


@dataclass(frozen=True)
class RewardSourceConfig:
    """The rewards that score completions."""

    sources: tuple[str, ...] = (NOT_GIVEN,)
    """One or more rewards: each a `module:function` (prompts, completions, columns by name) ->
    numbers, a reward model's folder, or a bag-of-words model (.json)."""
    weights: tuple[float, ...] = ()
    """Weight of each source in the summed reward; by default 1 each."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of a completion without an EOS."""
    normalise: bool = False
    """Standardise scores by their mean and standard deviation on the initial policy's samples."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError(
                "reward.sources: expected at least one of module:function, a reward model's folder "
                "or a .json file, got none"
            )
        named = is_given(self.sources)
        if named and self.weights and len(self.weights) != len(self.sources):
            raise ValueError(
                f"reward.weights: expected {len(self.sources)}, one for each of reward.sources, "
                f"got {len(self.weights)}"
            )
        for weight in self.weights:
            if not math.isfinite(weight):
                raise ValueError(f"reward.weights: expected finite numbers, got {weight}")
        within("reward.missing_eos_penalty", self.missing_eos_penalty, 0)  # it is subtracted


@dataclass(frozen=True)
class SamplesConfig:
    """The completions that are written to samples.jsonl, each with its prompt and rewards."""

    every: int = 10
    """Number of steps between those that are written, beside the first, the last and held-out ones;
    0 writes none."""
    num_completions: int = 16
    """Most completions of a step, or of an evaluation, that are written."""

    def __post_init__(self) -> None:
        within("samples.every", self.every, 0)
        within("samples.num_completions", self.num_completions, 1)


@dataclass(frozen=True, kw_only=True)
class SampledTrainingConfig(TrainingConfig):
    """Settings of an algorithm that trains on scored completions of its own policy."""

    data: PromptDataConfig = field(default_factory=PromptDataConfig)
    reward: RewardSourceConfig = field(default_factory=RewardSourceConfig)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    sampler: SamplerName = "transformers"
    """Engine that draws completions: the model itself (transformers), vLLM in this process, or
    a vLLM server (vllm-server)."""
    vllm: VllmOptions = field(default_factory=VllmOptions)
    watch: WatchConfig = field(default_factory=WatchConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
