"""Each preference loss as a small dataclass: its parameters on the command line, and no others."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastalign import losses
from fastalign.losses import PairLogprobs


@dataclass(frozen=True)
class PreferenceLoss:
    """What every preference loss has."""

    beta: float = 0.1
    """Strength of the pull towards the reference (for losses without one: the loss's scale)."""

    needs_reference: ClassVar[bool] = True
    uses_ties: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"loss.beta: expected a finite number above 0, got {self.beta!r}")

    def __call__(self, pairs: PairLogprobs) -> Tensor:
        """Losses (B,) of B pairs."""
        raise NotImplementedError


@dataclass(frozen=True)
class DPOLoss(PreferenceLoss):
    """DPO, arXiv 2305.18290."""

    def __call__(self, pairs: PairLogprobs) -> Tensor:
        """Losses (B,): `losses.dpo`."""
        return losses.dpo(*pairs.logprobs(), beta=self.beta)


@dataclass(frozen=True)
class LabelSmoothedLoss(PreferenceLoss):
    """cDPO: some labels are flipped."""

    label_smoothing: float = 0.1
    """Share of labels taken to be wrong."""

    def __call__(self, pairs: PairLogprobs) -> Tensor:
        """Losses (B,): `losses.dpo_label_smoothed`."""
        return losses.dpo_label_smoothed(
            *pairs.logprobs(), beta=self.beta, label_smoothing=self.label_smoothing
        )


@dataclass(frozen=True)
class RobustLoss(PreferenceLoss):
    """rDPO, arXiv 2403.00409."""

    label_smoothing: float = 0.1
    """Share of labels taken to be wrong."""

    def __call__(self, pairs: PairLogprobs) -> Tensor:
        """Losses (B,): `losses.dpo_robust`."""
        return losses.dpo_robust(
            *pairs.logprobs(), beta=self.beta, label_smoothing=self.label_smoothing
        )


@dataclass(frozen=True)
class HingeLoss(PreferenceLoss):
    """Hinge, arXiv 2305.10425."""

    def __call__(self, pairs: PairLogprobs) -> Tensor:
        """Losses (B,): `losses.hinge`."""
        return losses.hinge(*pairs.logprobs(), beta=self.beta)


@dataclass(frozen=True)
class IPOSumLoss(PreferenceLoss):
    """IPO on sequence log-probs, arXiv 2310.12036."""

    def __call__(self, pairs: PairLogprobs) -> Tensor:
        """Losses (B,): `losses.ipo_sum`."""
        return losses.ipo_sum(*pairs.logprobs(), beta=self.beta)


@dataclass(frozen=True)
class IPOMeanLoss(PreferenceLoss):
    """IPO on per-token means."""

    def __call__(self, pairs: PairLogprobs) -> Tensor:
        """Losses (B,): `losses.ipo_mean`."""
        return losses.ipo_mean(
            *pairs.logprobs(), pairs.chosen_length, pairs.rejected_length, beta=self.beta
        )


@dataclass(frozen=True)
class LengthNormalisedLoss(PreferenceLoss):
    """DPO on per-token means, arXiv 2411.15124."""

    def __call__(self, pairs: PairLogprobs) -> Tensor:
        """Losses (B,): `losses.dpo_length_normalised`."""
        return losses.dpo_length_normalised(
            *pairs.logprobs(), pairs.chosen_length, pairs.rejected_length, beta=self.beta
        )


@dataclass(frozen=True)
class LengthPenalisedLoss(PreferenceLoss):
    """R-DPO, arXiv 2403.19159."""

    alpha: float = 0.01
    """Penalty of a token by which the chosen response is longer."""

    def __call__(self, pairs: PairLogprobs) -> Tensor:
        """Losses (B,): `losses.dpo_length_penalised`."""
        return losses.dpo_length_penalised(
            *pairs.logprobs(),
            pairs.chosen_length,
            pairs.rejected_length,
            beta=self.beta,
            alpha=self.alpha,
        )


@dataclass(frozen=True)
class SimPOLoss(PreferenceLoss):
    """SimPO, arXiv 2405.14734; no reference."""

    beta: float = 2.0
    """Scale of the mean log-probs."""
    gamma: float = 1.0
    """Target margin."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, pairs: PairLogprobs) -> Tensor:
        """Losses (B,): `losses.simpo`."""
        return losses.simpo(
            pairs.policy_chosen_logprob,
            pairs.policy_rejected_logprob,
            pairs.chosen_length,
            pairs.rejected_length,
            beta=self.beta,
            gamma=self.gamma,
        )


@dataclass(frozen=True)
class ORPOLoss(PreferenceLoss):
    """ORPO, arXiv 2403.07691; no reference."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, pairs: PairLogprobs) -> Tensor:
        """Losses (B,): `losses.orpo`."""
        return losses.orpo(
            pairs.policy_chosen_logprob,
            pairs.policy_rejected_logprob,
            pairs.chosen_length,
            pairs.rejected_length,
            beta=self.beta,
        )


@dataclass(frozen=True)
class RaoKupperLoss(PreferenceLoss):
    """DPO with ties, Rao-Kupper model, arXiv 2409.17431."""

    nu: float = 3.0
    """How common ties are; equal responses tie with probability (nu - 1) / (nu + 1)."""

    uses_ties: ClassVar[bool] = True

    def __call__(self, pairs: PairLogprobs) -> Tensor:
        """Losses (B,): `losses.dpo_rao_kupper`."""
        return losses.dpo_rao_kupper(*pairs.logprobs(), pairs.tie, beta=self.beta, nu=self.nu)


@dataclass(frozen=True)
class DavidsonLoss(PreferenceLoss):
    """DPO with ties, Davidson model, arXiv 2409.17431."""

    nu: float = 1.0
    """How common ties are; equal responses tie with probability nu / (nu + 1)."""

    uses_ties: ClassVar[bool] = True

    def __call__(self, pairs: PairLogprobs) -> Tensor:
        """Losses (B,): `losses.dpo_davidson`."""
        return losses.dpo_davidson(*pairs.logprobs(), pairs.tie, beta=self.beta, nu=self.nu)


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
