"""Each loss of a reward model as a small dataclass: its parameters on the command line."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastalign import losses


@dataclass(frozen=True)
class RewardLoss:
    """What every loss of a reward model has."""

    uses_ties: ClassVar[bool] = False
    uses_margins: ClassVar[bool] = False

    def of_pairs(
        self,
        chosen: Tensor,  # (B,)
        rejected: Tensor,  # (B,)
        tie: Tensor,  # (B,) bool
        margin: Tensor,  # (B,)
        nu: Tensor | None,  # ()
    ) -> Tensor:
        """Each pair's loss (B,); `nu` is the one that is being learned, None where none is."""
        raise NotImplementedError


@dataclass(frozen=True)
class BradleyTerryLoss(RewardLoss):
    """Bradley-Terry; a row's `margin`, where it has one, is how far apart the rewards should be."""

    centring_coefficient: float = 0.0
    """Of the squared sum of a pair's rewards, which holds their mean near zero."""

    uses_margins = True

    def __post_init__(self) -> None:
        if not 0 <= self.centring_coefficient < float("inf"):
            raise ValueError(
                "loss.centring_coefficient: expected a finite number of at least 0, got "
                f"{self.centring_coefficient!r}"
            )

    def of_pairs(
        self, chosen: Tensor, rejected: Tensor, tie: Tensor, margin: Tensor, nu: Tensor | None
    ) -> Tensor:
        """See `losses.bradley_terry`."""
        return losses.bradley_terry(
            chosen, rejected, margin=margin, centring_coefficient=self.centring_coefficient
        )


@dataclass(frozen=True)
class TieLoss(RewardLoss):
    """A loss with ties; what is learned of nu is the logarithm of nu - `least_nu`."""

    nu: float = 1.0
    """How common ties are."""
    nu_lr: float = 0.0
    """Peak learning rate of nu (of its logarithm), under optim.schedule; 0: nu stays."""

    uses_ties = True
    least_nu: ClassVar[float] = 0.0
    function: ClassVar[Callable[..., Tensor]]

    def __post_init__(self) -> None:
        if not self.least_nu < self.nu < float("inf"):
            raise ValueError(
                f"loss.nu: expected a finite number above {self.least_nu:g}, got {self.nu!r}"
            )
        if not 0 <= self.nu_lr < float("inf"):
            raise ValueError(
                f"loss.nu_lr: expected a finite number of at least 0, got {self.nu_lr!r}"
            )

    @property
    def log_nu(self) -> float:
        """What a learned nu begins at."""
        return math.log(self.nu - self.least_nu)

    def nu_of(self, log_nu: Tensor) -> Tensor:
        """Nu, () float64: near `least_nu` a float32 would be rounded to it."""
        return self.least_nu + log_nu.double().exp()

    def of_pairs(
        self, chosen: Tensor, rejected: Tensor, tie: Tensor, margin: Tensor, nu: Tensor | None
    ) -> Tensor:
        """See `losses.rao_kupper`, `losses.davidson`."""
        return type(self).function(chosen - rejected, tie, nu=self.nu if nu is None else nu)


@dataclass(frozen=True)
class RewardRaoKupperLoss(TieLoss):
    """Bradley-Terry with ties, Rao-Kupper model."""

    nu: float = 3.0
    """How common ties are; equal responses tie with probability (nu - 1) / (nu + 1)."""

    least_nu = 1.0
    function = losses.rao_kupper


@dataclass(frozen=True)
class RewardDavidsonLoss(TieLoss):
    """Bradley-Terry with ties, Davidson model."""

    nu: float = 1.0
    """How common ties are; equal responses tie with probability nu / (nu + 1)."""

    function = losses.davidson


REWARD_LOSSES: dict[str, type[RewardLoss]] = {
    "bradley_terry": BradleyTerryLoss,
    "rao_kupper": RewardRaoKupperLoss,
    "davidson": RewardDavidsonLoss,
}
