"""The choices of an update: advantages, policy losses, their mean, and importance weights.

`--ppo.advantage gae | rloo | grpo | dr_grpo`, `--ppo.loss`, `--ppo.mean`, `--ppo.importance`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastalign.losses import (
    dr_grpo_advantage,
    grpo_advantage,
    rloo_advantage,
    whiten,
    whitening_scale,
)
from fastalign.losses.chunk_losses import Responses
from fastalign.losses.policy import (
    PolicyTerms,
    cispo_terms,
    clip_terms,
    importance_weight,
    masked_importance_weight,
    sequence_log_ratio,
)
from fastalign.ops import gae
from fastalign.ops.segments import segment_sum
from fastalign.runs.config import above_zero, require, within


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


@dataclass(frozen=True)
class DrGrpo(GroupAdvantage):
    """The score less the mean of the prompt's responses, arXiv 2503.20783."""

    name = "dr_grpo"
    formula = dr_grpo_advantage


ADVANTAGES: dict[str, type[AdvantageEstimator]] = {
    estimator.name: estimator for estimator in (Gae, Rloo, Grpo, DrGrpo)
}


@dataclass(frozen=True)
class PolicyObjective:
    """A policy loss with its parameters; a subclass holds its own and no others."""

    name: ClassVar[str]  # on the command line
    by_response: ClassVar[bool] = False  # whether it compares whole responses

    def terms(
        self,
        logprob: Tensor,
        old_logprob: Tensor,
        advantage: Tensor,
        responses: Responses | None,
        max_log_ratio: float,
    ) -> PolicyTerms:
        """Return the losses of n tokens; see `losses.chunk_losses.PolicyTermsFunction`."""
        raise NotImplementedError


def check_clip(objective: "Clip | Gspo") -> None:
    """Raise ValueError unless the distances of a clipped ratio's bounds from 1 can be used."""
    low, high = objective.clip_range, objective.clip_range_high
    require(0 < low < 1, "ppo.loss.clip_range", "a number in (0, 1)", low)
    above_zero("ppo.loss.clip_range_high", high)


@dataclass(frozen=True)
class Clip(PolicyObjective):
    """PPO's clipped objective, arXiv 1707.06347."""

    clip_range: float = 0.2
    """Clip each token's probability ratio from below at 1 less this."""
    clip_range_high: float | None = None
    """Clip it from above at 1 plus this (clip-higher, arXiv 2503.14476); by default the same."""
    dual_clip: float | None = None
    """Largest ratio of a token with a negative advantage (arXiv 1912.09729); by default none."""

    name = "clip"

    def __post_init__(self) -> None:
        check_clip(self)
        if self.dual_clip is not None:
            require(self.dual_clip > 1, "ppo.loss.dual_clip", "more than 1", self.dual_clip)

    def terms(
        self,
        logprob: Tensor,
        old_logprob: Tensor,
        advantage: Tensor,
        responses: Responses | None,
        max_log_ratio: float,
    ) -> PolicyTerms:
        """See `PolicyObjective.terms` and `losses.ppo_clip`."""
        return clip_terms(
            logprob - old_logprob,
            advantage,
            clip_range=self.clip_range,
            clip_range_high=self.clip_range_high,
            dual_clip=self.dual_clip,
            max_log_ratio=max_log_ratio,
        )


@dataclass(frozen=True)
class Gspo(PolicyObjective):
    """The clipped objective by the ratios of whole responses (GSPO), arXiv 2507.18071."""

    clip_range: float = 3e-4
    """Clip each response's mean ratio from below at 1 less this."""
    clip_range_high: float | None = 4e-4
    """Clip it from above at 1 plus this."""

    name = "gspo"
    by_response = True

    def __post_init__(self) -> None:
        check_clip(self)

    def terms(
        self,
        logprob: Tensor,
        old_logprob: Tensor,
        advantage: Tensor,
        responses: Responses | None,
        max_log_ratio: float,
    ) -> PolicyTerms:
        """See `PolicyObjective.terms` and `losses.gspo_clip`."""
        assert responses is not None
        return clip_terms(
            sequence_log_ratio(logprob, old_logprob, responses.bounds, responses.length),
            advantage,
            clip_range=self.clip_range,
            clip_range_high=self.clip_range_high,
            max_log_ratio=max_log_ratio,
        )


@dataclass(frozen=True)
class Cispo(PolicyObjective):
    """Log-probs weighted by clipped ratios: no token loses its gradient, arXiv 2506.13585."""

    max_ratio: float = 5.0
    """Largest ratio that a token is weighted by."""
    min_ratio: float = 0.0
    """Smallest ratio that a token is weighted by."""

    name = "cispo"

    def __post_init__(self) -> None:
        above_zero("ppo.loss.max_ratio", self.max_ratio)
        expected = f"at least 0 and below ppo.loss.max_ratio ({self.max_ratio})"
        require(
            0 <= self.min_ratio < self.max_ratio, "ppo.loss.min_ratio", expected, self.min_ratio
        )

    def terms(
        self,
        logprob: Tensor,
        old_logprob: Tensor,
        advantage: Tensor,
        responses: Responses | None,
        max_log_ratio: float,
    ) -> PolicyTerms:
        """See `PolicyObjective.terms` and `losses.cispo`."""
        return cispo_terms(
            logprob,
            old_logprob,
            advantage,
            max_ratio=self.max_ratio,
            min_ratio=self.min_ratio,
            max_log_ratio=max_log_ratio,
        )


POLICY_LOSSES: dict[str, type[PolicyObjective]] = {loss.name: loss for loss in (Clip, Gspo, Cispo)}


@dataclass(frozen=True)
class LossMean:
    """The mean that an update's policy loss is of its tokens' losses."""

    name: ClassVar[str]  # on the command line

    def divisor(self, lengths: Sequence[int], max_new_tokens: int) -> float:
        """Return what the sum of the tokens' losses is divided by.

        Args:
            lengths: number of tokens of each of the update's responses.
            max_new_tokens: the longest response that can be sampled.
        """
        raise NotImplementedError

    def token_weight(self, bounds: Tensor) -> Tensor | None:
        """Return the factor of each token's loss (n,), or None; `bounds` (R + 1,) of responses."""
        return None


@dataclass(frozen=True)
class TokenMean(LossMean):
    """All tokens of the update count the same, as in DAPO, arXiv 2503.14476."""

    name = "tokens"

    def divisor(self, lengths: Sequence[int], max_new_tokens: int) -> float:
        """See `LossMean.divisor`."""
        return sum(lengths)


@dataclass(frozen=True)
class SequenceMean(LossMean):
    """All responses count the same: the mean of each one's mean, GRPO's, arXiv 2402.03300."""

    name = "sequences"

    def divisor(self, lengths: Sequence[int], max_new_tokens: int) -> float:
        """See `LossMean.divisor`."""
        return len(lengths)

    def token_weight(self, bounds: Tensor) -> Tensor | None:
        """See `LossMean.token_weight`."""
        lengths = bounds.diff()
        return lengths.clamp(min=1).reciprocal().repeat_interleave(lengths)


@dataclass(frozen=True)
class ConstantMean(LossMean):
    """A response's losses are summed and divided by a constant, Dr. GRPO's, arXiv 2503.20783."""

    length: int | None = None
    """Divide by the number of responses times this; by default sampling.max_new_tokens."""

    name = "constant"

    def __post_init__(self) -> None:
        above_zero("ppo.mean.length", self.length)

    def divisor(self, lengths: Sequence[int], max_new_tokens: int) -> float:
        """See `LossMean.divisor`."""
        return len(lengths) * (self.length or max_new_tokens)


LOSS_MEANS: dict[str, type[LossMean]] = {
    mean.name: mean for mean in (TokenMean, SequenceMean, ConstantMean)
}


@dataclass(frozen=True)
class Importance:
    """The weights of tokens by trainer over sampler probability."""

    name: ClassVar[str]  # on the command line

    def weight(self, logprob: Tensor, sampler_logprob: Tensor, bounds: Tensor) -> Tensor | None:
        """Return the weight of each token (N,), or None; `bounds` (R + 1,) of responses."""
        raise NotImplementedError


@dataclass(frozen=True)
class Unweighted(Importance):
    """Tokens are not weighted: the sampler is the policy."""

    name = "none"

    def weight(self, logprob: Tensor, sampler_logprob: Tensor, bounds: Tensor) -> Tensor | None:
        """See `Importance.weight`."""
        return None


@dataclass(frozen=True)
class BoundedImportance(Importance):
    """Weights with bounds; a subclass says what becomes of one beyond them, and of what it is."""

    max_weight: float = 2.0
    """Largest weight."""
    min_weight: float = 0.0
    """Smallest weight."""

    masks: ClassVar[bool]
    by_response: ClassVar[bool]

    def __post_init__(self) -> None:
        above_zero("ppo.importance.max_weight", self.max_weight)
        low, expected = self.min_weight, f"at least 0 and below {self.max_weight} (max_weight)"
        require(0 <= low < self.max_weight, "ppo.importance.min_weight", expected, low)

    def weight(self, logprob: Tensor, sampler_logprob: Tensor, bounds: Tensor) -> Tensor | None:
        """See `Importance.weight`, `losses.importance_weight` and its masked form."""
        function = masked_importance_weight if self.masks else importance_weight
        return function(
            logprob,
            sampler_logprob,
            bounds if self.by_response else None,
            max_weight=self.max_weight,
            min_weight=self.min_weight,
        )


@dataclass(frozen=True)
class Truncated(BoundedImportance):
    """Each token's weight is truncated to the bounds, Ionides (2008)."""

    name = "truncated"
    masks, by_response = False, False


@dataclass(frozen=True)
class Masked(BoundedImportance):
    """A token whose weight is beyond the bounds is left out (IcePop), arXiv 2510.18855."""

    max_weight: float = 5.0
    """Largest weight."""
    min_weight: float = 0.5
    """Smallest weight."""

    name = "masked"
    masks, by_response = True, False


@dataclass(frozen=True)
class SequenceTruncated(BoundedImportance):
    """A token's weight is that of its response, truncated to the bounds."""

    name = "sequence_truncated"
    masks, by_response = False, True


@dataclass(frozen=True)
class SequenceMasked(BoundedImportance):
    """A token's weight is that of its response, which is left out if it is beyond the bounds."""

    name = "sequence_masked"
    masks, by_response = True, True


IMPORTANCE: dict[str, type[Importance]] = {
    each.name: each for each in (Unweighted, Truncated, Masked, SequenceTruncated, SequenceMasked)
}
