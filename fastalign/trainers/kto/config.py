"""Settings of KTO."""

from dataclasses import dataclass, field
from typing import ClassVar

from fastalign.runs.config import ReferencedConfig, UnpairedDataConfig, above_zero


@dataclass(frozen=True)
class KTOLoss:
    """KTO's loss, arXiv 2402.01306, with the weights of its two classes."""

    beta: float = 0.1
    """Strength of the pull towards the reference."""
    desirable_weight: float = 1.0
    """Weight of good answers; the paper keeps its product with their number at 1 to 4/3 of the bad
    ones'."""
    undesirable_weight: float = 1.0
    """Weight of bad answers."""

    uses_ties: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            above_zero(f"loss.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class KTOConfig(ReferencedConfig):
    """KTO on answers that were found good or bad, or on comparisons split into the two."""

    data: UnpairedDataConfig = field(default_factory=UnpairedDataConfig)
    loss: KTOLoss = field(default_factory=KTOLoss)
