"""The settings of online DPO."""

from dataclasses import dataclass, field
from typing import Literal

from fastalign.ranks.config import ParallelConfig
from fastalign.rollouts import SamplerName, SamplingParams, VllmOptions, check_sampler
from fastalign.runs.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from fastalign.trainers.dpo.losses import DPOLoss, PreferenceLoss
from fastalign.trainers.sampling.config import PromptDataConfig, RewardSourceConfig, WatchConfig


@dataclass(frozen=True)
class OnlineReferenceConfig:
    """The model that the policy is held near."""

    path: str | None = None
    """Folder or hub name; default: the model that training starts from."""
    refresh_every: int = 0
    """Steps after which the policy as it then is becomes the reference; 0: never."""

    def __post_init__(self) -> None:
        if self.refresh_every < 0:
            raise ValueError(
                f"reference.refresh_every: expected at least 0, got {self.refresh_every}"
            )
        if self.refresh_every and self.path is not None:
            raise ValueError(
                "reference.refresh_every: a refreshed reference begins as the model that training "
                f"starts from; expected no reference.path with it, got {self.path!r}"
            )


@dataclass(frozen=True)
class FreshPairsConfig:
    """The pairs of a step: each prompt's best and worst sample."""

    ties: Literal["drop", "use"] = "drop"
    """Prompts whose samples all have one score: drop and count, or use as ties (by a loss that has
    a place for them)."""
    epochs: int = 1
    """Passes over a step's pairs."""
    mini_batches: int = 1
    """Updates of a pass; each has its share of the pairs."""

    def __post_init__(self) -> None:
        for name in ("epochs", "mini_batches"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"pairs.{name}: expected at least 1, got {value}")


@dataclass(frozen=True)
class OnlineDPOConfig:
    """Online DPO: preference pairs of the policy's own samples, ordered by a reward.

    A step is the samples of train.batch_size prompts and the updates on their pairs. Exit code 0,
    130 after SIGINT, or 3 where --watch.stop ended the run; either way the run is saved and can be
    resumed.
    """

    model: ModelConfig
    data: PromptDataConfig
    reward: RewardSourceConfig
    run: RunConfig
    loss: PreferenceLoss = field(default_factory=DPOLoss)
    reference: OnlineReferenceConfig = field(default_factory=OnlineReferenceConfig)
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(num_samples=4))
    sampler: SamplerName = "transformers"
    """What draws completions: the policy in this process, vLLM in it, in a process of its own, or a
    server that `fastalign vllm-server` started."""
    vllm: VllmOptions = field(default_factory=VllmOptions)
    pairs: FreshPairsConfig = field(default_factory=FreshPairsConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        check_sampler(self.sampler, self.vllm)
        if self.sampling.num_samples < 2:
            raise ValueError(
                "sampling.num_samples: expected at least 2, of which the best and the worst are a "
                f"pair, got {self.sampling.num_samples}"
            )
        if self.sampling.temperature == 0:
            raise ValueError(
                "sampling.temperature: expected more than 0, for samples of a prompt must differ, "
                "got 0"
            )
        if self.pairs.ties == "use" and not self.loss.uses_ties:
            raise ValueError(
                "pairs.ties: expected drop, for this loss has no place for ties (dpo_rao_kupper "
                "and dpo_davidson have), got 'use'"
            )
        if not self.loss.formula().needs_reference:
            self._refuse_a_reference()

    def _refuse_a_reference(self) -> None:
        for name, none in (("path", None), ("refresh_every", 0)):
            value = getattr(self.reference, name)
            if value != none:
                raise ValueError(
                    f"reference.{name}: expected {'none' if none is None else none}, for this loss "
                    f"has no reference, got {value!r}"
                )
