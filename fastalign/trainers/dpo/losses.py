"""Each preference loss as a small dataclass: its parameters on the command line, and no others."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import Tensor

from fastalign import losses
from fastalign.ops import PreferenceFormula


@dataclass(frozen=True)
class PreferenceLoss:
    """What every preference loss has."""

    beta: float = 0.1
    """Strength of the pull towards the reference, or the loss's scale if it has no reference."""

    function: ClassVar[Callable[..., Tensor]]

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"loss.beta: expected a finite number above 0, got {self.beta!r}")

    @property
    def name(self) -> str:
        """The loss's name on the command line and in `config.yaml`: its function's."""
        return type(self).function.__name__

    @property
    def uses_ties(self) -> bool:
        """Whether the loss has a place for ties."""
        return self.formula().uses_ties

    def formula(self) -> PreferenceFormula:
        """The loss, with these fields as its parameters."""
        return losses.formula(type(self).function, **asdict(self))


@dataclass(frozen=True)
class DPOLoss(PreferenceLoss):
    """DPO, arXiv 2305.18290."""

    function = losses.dpo


@dataclass(frozen=True)
class LabelSmoothedLoss(PreferenceLoss):
    """cDPO, DPO with label smoothing."""

    label_smoothing: float = 0.1
    """Assumed share of wrong labels."""

    function = losses.dpo_label_smoothed


@dataclass(frozen=True)
class RobustLoss(PreferenceLoss):
    """rDPO, arXiv 2403.00409."""

    label_smoothing: float = 0.1
    """Assumed share of wrong labels."""

    function = losses.dpo_robust


@dataclass(frozen=True)
class HingeLoss(PreferenceLoss):
    """Hinge, arXiv 2305.10425."""

    function = losses.hinge


@dataclass(frozen=True)
class IPOSumLoss(PreferenceLoss):
    """IPO on sequence log-probs, arXiv 2310.12036."""

    function = losses.ipo_sum


@dataclass(frozen=True)
class IPOMeanLoss(PreferenceLoss):
    """IPO on per-token means."""

    function = losses.ipo_mean


@dataclass(frozen=True)
class LengthNormalisedLoss(PreferenceLoss):
    """DPO on per-token means, arXiv 2411.15124."""

    function = losses.dpo_length_normalised


@dataclass(frozen=True)
class LengthPenalisedLoss(PreferenceLoss):
    """R-DPO, arXiv 2403.19159."""

    alpha: float = 0.01
    """Penalty per token that the chosen response is longer."""

    function = losses.dpo_length_penalised


@dataclass(frozen=True)
class SimPOLoss(PreferenceLoss):
    """SimPO, arXiv 2405.14734; no reference."""

    beta: float = 2.0
    """Scale of the mean log-probs per token."""
    gamma: float = 1.0
    """Target margin between chosen and rejected."""

    function = losses.simpo


@dataclass(frozen=True)
class ORPOLoss(PreferenceLoss):
    """ORPO, arXiv 2403.07691; no reference."""

    function = losses.orpo


@dataclass(frozen=True)
class RaoKupperLoss(PreferenceLoss):
    """DPO with ties, Rao-Kupper model, arXiv 2409.17431."""

    nu: float = 3.0
    """Frequency of ties: equal responses tie with probability (nu - 1) / (nu + 1)."""

    function = losses.dpo_rao_kupper


@dataclass(frozen=True)
class DavidsonLoss(PreferenceLoss):
    """DPO with ties, Davidson model, arXiv 2409.17431."""

    nu: float = 1.0
    """Frequency of ties: equal responses tie with probability nu / (nu + 1)."""

    function = losses.dpo_davidson


LOSSES: dict[str, type[PreferenceLoss]] = {
    "dpo": DPOLoss,
    "dpo_label_smoothed": LabelSmoothedLoss,
    "dpo_robust": RobustLoss,
    "hinge": HingeLoss,
    "ipo_sum": IPOSumLoss,
    "ipo_mean": IPOMeanLoss,
    "dpo_length_normalised": LengthNormalisedLoss,
    "dpo_length_penalised": LengthPenalisedLoss,
    "simpo": SimPOLoss,
    "orpo": ORPOLoss,
    "dpo_rao_kupper": RaoKupperLoss,
    "dpo_davidson": DavidsonLoss,
}
