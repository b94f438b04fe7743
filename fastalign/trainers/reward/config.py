"""Settings of reward-model training; each loss is a small dataclass of its parameters."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign import losses
from fastalign.runs.config import (
    OptimConfig,
    PreferenceDataConfig,
    TrainingConfig,
    require,
    within,
)


@dataclass(frozen=True)
class Labels:
    """The labels of B pairs.

    Attributes:
        tie: pairs that are ties, (B,) bool.
        margin: difference of rewards to exceed, (B,); 0 where the row has none.
        shares: shares of the votes for the first, the second and a tie, (B, 3); None without votes.
    """

    tie: Tensor
    margin: Tensor
    shares: Tensor | None

    def at(self, chosen: list[int], device: torch.device) -> "Labels":
        """Return the labels of the chosen pairs, on a device."""

        def moved(values: Tensor) -> Tensor:
            return values[chosen].to(device, non_blocking=True)

        shares = None if self.shares is None else moved(self.shares)
        return Labels(moved(self.tie), moved(self.margin), shares)


@dataclass(frozen=True)
class RewardLoss:
    """The options and methods of every loss of a reward model."""

    votes: bool = False
    """Train on each row's vote shares (column `votes`) instead of its label."""

    name: ClassVar[str]
    has_ties: ClassVar[bool] = False
    uses_margins: ClassVar[bool] = False

    @property
    def uses_ties(self) -> bool:
        """True if rows labelled as ties can be trained on: by a model of ties, or by votes."""
        return self.has_ties or self.votes

    def pair_losses(self, rewards: Tensor, pairs: Labels, nu: Tensor | None) -> Tensor:
        """Return the losses (B,) of rewards (B, 2), the chosen response's first.

        `nu` () is the tie parameter if it is learned, else None.
        """
        raise NotImplementedError

    def outcomes(self, difference: Tensor, nu: Tensor | None) -> Tensor:
        """Return log-probabilities (B, 3) of a win, a loss and a tie, of differences (B,)."""
        raise NotImplementedError


@dataclass(frozen=True)
class BradleyTerryLoss(RewardLoss):
    """Bradley-Terry; a row's `margin`, if given, is subtracted from the rewards' difference."""

    centring_coefficient: float = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps their mean near zero."""

    name = "bradley_terry"
    uses_margins = True

    def __post_init__(self) -> None:
        within("loss.centring_coefficient", self.centring_coefficient, 0)

    def pair_losses(self, rewards: Tensor, pairs: Labels, nu: Tensor | None) -> Tensor:
        """Return `losses.bradley_terry`, or `losses.bradley_terry_votes` for votes."""
        terms: Any = {"margin": pairs.margin, "centring_coefficient": self.centring_coefficient}
        chosen, rejected = rewards.unbind(-1)
        if not self.votes:
            return losses.bradley_terry(chosen, rejected, **terms)
        assert pairs.shares is not None
        return losses.bradley_terry_votes(chosen, rejected, pairs.shares, **terms)

    def outcomes(self, difference: Tensor, nu: Tensor | None) -> Tensor:
        """Return log-probabilities (B, 3); a tie has probability 0."""
        never = torch.full_like(difference, -math.inf)
        return torch.stack((F.logsigmoid(difference), F.logsigmoid(-difference), never), dim=-1)


@dataclass(frozen=True)
class TieLoss(RewardLoss):
    """A loss with ties; a learned nu is parametrised by log(nu - `least_nu`)."""

    nu: float = 1.0
    """Frequency of ties."""
    nu_lr: float = 0.0
    """Peak learning rate of log nu under optim.schedule; 0 keeps nu fixed."""

    has_ties = True
    least_nu: ClassVar[float] = 0.0
    label_loss: ClassVar[Callable[..., Tensor]]
    vote_loss: ClassVar[Callable[..., Tensor]]
    tie_outcomes: ClassVar[Callable[..., Tensor]]

    def __post_init__(self) -> None:
        expected = f"a finite number above {self.least_nu:g}"
        require(self.least_nu < self.nu < math.inf, "loss.nu", expected, self.nu)
        within("loss.nu_lr", self.nu_lr, 0)

    @property
    def log_nu(self) -> float:
        """Initial value of log(nu - `least_nu`)."""
        return math.log(self.nu - self.least_nu)

    def nu_of(self, log_nu: Tensor) -> Tensor:
        """Return nu, () float64: near `least_nu`, float32 would round to it."""
        return self.least_nu + log_nu.double().exp()

    def pair_losses(self, rewards: Tensor, pairs: Labels, nu: Tensor | None) -> Tensor:
        """Return `label_loss` of the differences, or `vote_loss` for votes."""
        difference = rewards[:, 0] - rewards[:, 1]
        value = self.nu if nu is None else nu
        if self.votes:
            return type(self).vote_loss(difference, pairs.shares, nu=value)
        return type(self).label_loss(difference, pairs.tie, nu=value)

    def outcomes(self, difference: Tensor, nu: Tensor | None) -> Tensor:
        """Return the tie model's log-probabilities (B, 3)."""
        return type(self).tie_outcomes(difference, nu=self.nu if nu is None else nu)


@dataclass(frozen=True)
class RewardRaoKupperLoss(TieLoss):
    """Bradley-Terry with ties, Rao-Kupper model."""

    nu: float = 3.0
    """Frequency of ties: equal responses tie with probability (nu - 1) / (nu + 1)."""

    name = "rao_kupper"
    least_nu = 1.0
    label_loss = losses.rao_kupper
    vote_loss = losses.rao_kupper_votes
    tie_outcomes = losses.rao_kupper_outcomes


@dataclass(frozen=True)
class RewardDavidsonLoss(TieLoss):
    """Bradley-Terry with ties, Davidson model."""

    nu: float = 1.0
    """Frequency of ties: equal responses tie with probability nu / (nu + 1)."""

    name = "davidson"
    label_loss = losses.davidson
    vote_loss = losses.davidson_votes
    tie_outcomes = losses.davidson_outcomes


REWARD_LOSSES: dict[str, type[RewardLoss]] = {
    loss.name: loss for loss in (BradleyTerryLoss, RewardRaoKupperLoss, RewardDavidsonLoss)
}


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainingConfig):
    """Reward-model training on comparisons."""

    data: PreferenceDataConfig = field(default_factory=PreferenceDataConfig)
    loss: RewardLoss = field(default_factory=BradleyTerryLoss)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
