"""Settings of online DPO."""

from dataclasses import dataclass, field
from typing import Literal

from fastalign.rollouts.engines.options import check_sampler
from fastalign.rollouts.sampler import SamplingParams
from fastalign.runs.config import at_least, require
from fastalign.trainers.dpo.config import LOSSES, PreferenceLoss
from fastalign.trainers.sampling.config import SampledTrainingConfig


@dataclass(frozen=True)
class OnlineReferenceConfig:
    """The reference model that the policy is kept close to."""

    path: str | None = None
    """Folder or hub name; by default the model that training starts from."""
    refresh_every: int = 0
    """Replace the reference by the current policy every so many steps; 0 never does."""

    def __post_init__(self) -> None:
        at_least(0, "reference", self, "refresh_every")
        if self.refresh_every and self.path is not None:
            raise ValueError(
                "reference.refresh_every: a refreshed reference begins as the model that training "
                f"starts from; expected no reference.path with it, got {self.path!r}"
            )


@dataclass(frozen=True)
class FreshPairsConfig:
    """The pairs of a step: the best and the worst sample of each prompt."""

    ties: Literal["drop", "use"] = "drop"
    """Drop and count prompts whose samples all have one score, or use them as ties under a loss
    with ties."""
    epochs: int = 1
    """Number of passes over a step's pairs."""
    mini_batches: int = 1
    """Number of updates per pass, each with an equal share of the pairs."""

    def __post_init__(self) -> None:
        at_least(1, "pairs", self, "epochs", "mini_batches")


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(SampledTrainingConfig):
    """Online DPO on pairs of the policy's own samples, ordered by a reward.

    A step samples train.batch_size prompts and updates the policy on their pairs. The exit code is
    0, 130 after SIGINT, or 3 if --watch.stop ended the run; the run is saved in each case.
    """

    loss: PreferenceLoss = field(default_factory=LOSSES["dpo"])
    reference: OnlineReferenceConfig = field(default_factory=OnlineReferenceConfig)
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(num_samples=4))
    pairs: FreshPairsConfig = field(default_factory=FreshPairsConfig)

    def __post_init__(self) -> None:
        check_sampler(self.sampler, self.vllm)
        samples = self.sampling
        expected = "at least 2, of which the best and the worst are a pair"
        require(samples.num_samples >= 2, "sampling.num_samples", expected, samples.num_samples)
        expected = "more than 0, for samples of a prompt must differ"
        require(samples.temperature > 0, "sampling.temperature", expected, samples.temperature)
        if self.pairs.ties == "use" and not self.loss.uses_ties:
            raise ValueError(
                "pairs.ties: expected drop, for this loss has no place for ties (dpo_rao_kupper "
                "and dpo_davidson have), got 'use'"
            )
        if not self.loss.formula().needs_reference:
            for name, none in (("path", None), ("refresh_every", 0)):
                value = getattr(self.reference, name)
                expected = f"{'none' if none is None else none}, for this loss has no reference"
                require(value == none, f"reference.{name}", expected, value)
