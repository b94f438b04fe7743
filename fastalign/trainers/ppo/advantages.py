"""Advantages of tokens from their rewards: `--ppo.advantage gae | rloo | grpo`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastalign.losses import grpo_advantage, rloo_advantage, whiten, whitening_scale
from fastalign.ops import gae
from fastalign.ops.segments import segment_sum
from fastalign.runs.config import require, within


@dataclass(frozen=True)
class Advantages:
    """The result of an estimate; N tokens.

    Attributes:
        advantage: (N,).
        returns: (N,) targets of the value model; None without one.
        scale: factor by which whitening multiplied rewards on their way into the advantage.
    """

    advantage: Tensor
    returns: Tensor | None
    scale: float


@dataclass(frozen=True)
class AdvantageEstimator:
    """An estimate of advantages; a subclass holds its own parameters and no others."""

    name: ClassVar[str]  # on the command line
    needs_value: ClassVar[bool] = False  # whether it needs a value model

    def estimate(
        self, reward: Tensor, value: Tensor | None, bounds: Tensor, num_samples: int
    ) -> Advantages:
        """Return the advantage of every token, and the returns if there is a value model.

        A response that was cut off ends there: its continuation is not bootstrapped, since its
        score was given for the text that there is.

        Args:
            reward: (N,) reward of every token.
            value: (N,) value of the state that each token was drawn in, or None.
            bounds: (R + 1,) int64; response r owns the tokens bounds[r] to bounds[r + 1].
            num_samples: responses of each prompt.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Gae(AdvantageEstimator):
    """Generalised advantage estimation by a value model, arXiv 1506.02438."""

    gamma: float = 1.0
    """Discount of later rewards."""
    gae_lambda: float = 0.95
    """Weight of longer returns."""
    whiten: Literal["advantages", "rewards", "both", "none"] = "advantages"
    """Scale these to standard deviation 1 over a step's tokens (rewards keep their mean)."""

    name = "gae"
    needs_value = True

    def __post_init__(self) -> None:
        within("ppo.advantage.gamma", self.gamma, 0, 1)
        within("ppo.advantage.gae_lambda", self.gae_lambda, 0, 1)
        known = self.whiten in ("advantages", "rewards", "both", "none")
        require(known, "ppo.advantage.whiten", "advantages, rewards, both or none", self.whiten)

    def estimate(
        self, reward: Tensor, value: Tensor | None, bounds: Tensor, num_samples: int
    ) -> Advantages:
        """See `AdvantageEstimator.estimate` and `ops.gae`."""
        assert value is not None
        scale = 1.0
        if self.whiten in ("rewards", "both"):
            scale = whitening_scale(reward).item()
            reward = whiten(reward, shift_mean=False)
        advantage, returns = gae(
            reward, value, bounds, gamma=self.gamma, gae_lambda=self.gae_lambda
        )
        if self.whiten in ("advantages", "both"):
            scale *= whitening_scale(advantage).item()
            advantage = whiten(advantage)
        return Advantages(advantage, returns, scale)


@dataclass(frozen=True)
class GroupAdvantage(AdvantageEstimator):
    """One advantage for all tokens of a response, from the other responses to its prompt."""

    whiten: Literal["none", "advantages"] = "none"
    """Scale advantages to standard deviation 1 over a step's tokens."""

    formula: ClassVar[Callable[[Tensor, int], Tensor]]

    def __post_init__(self) -> None:
        known = self.whiten in ("none", "advantages")
        expected = f"none or advantages under {self.name}, which has one reward a response"
        require(known, "ppo.advantage.whiten", expected, self.whiten)

    def estimate(
        self, reward: Tensor, value: Tensor | None, bounds: Tensor, num_samples: int
    ) -> Advantages:
        """See `AdvantageEstimator.estimate` and the formula."""
        of_response = type(self).formula(segment_sum(reward, bounds), num_samples)
        advantage = of_response.repeat_interleave(bounds.diff(), output_size=len(reward))
        scale = 1.0
        if self.whiten == "advantages":
            scale = whitening_scale(advantage).item()
            advantage = whiten(advantage)
        return Advantages(advantage, None, scale)


@dataclass(frozen=True)
class Rloo(GroupAdvantage):
    """The score less the mean of the prompt's other responses, arXiv 2402.14740."""

    name = "rloo"
    formula = rloo_advantage


@dataclass(frozen=True)
class Grpo(GroupAdvantage):
    """The score less the mean of the prompt's responses, over their deviation, arXiv 2402.03300."""

    name = "grpo"
    formula = grpo_advantage


ADVANTAGES: dict[str, type[AdvantageEstimator]] = {
    estimator.name: estimator for estimator in (Gae, Rloo, Grpo)
}
