"""A preference loss with its parameters: the function that defines it, and its kernel's member."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from fastalign.ops.preference_loss.pairs import PairLogprobs


class LinkFunction(IntEnum):
    """Functions from a pair's margin x to its loss, in the order of `csrc/preference_pair.h`."""

    LOGISTIC = 0  # right * softplus(threshold - x) + wrong * softplus(threshold + x)
    HINGE = 1  # max(0, 1 - x)
    SQUARE = 2  # (x - threshold)^2
    DAVIDSON = 3  # log(1 + e^-x + e^(tie_offset - x/2))
    ORPO = 4  # -mean log pi(c) + beta * softplus(log odds(r) - log odds(c))


@dataclass(frozen=True)
class PairLink:
    """The member of the kernels' family of losses that computes a formula.

    It is a link function of the margin x = beta * h + length_weight * (|c| - |r|), with h the
    difference of log-ratios, of means over tokens if `per_token`; ORPO's is one of both log-probs.
    A tie has `right` and `wrong` 1 and a loss lower by `tie_offset`; in Davidson's model also
    higher by x/2. `nll_coefficient` times `PairLogprobs.chosen_nll` is added to what the kernels
    return.
    """

    link: LinkFunction
    per_token: bool = False
    beta: float = 1.0
    length_weight: float = 0.0
    threshold: float = 0.0
    right: float = 1.0
    wrong: float = 0.0
    tie_offset: float = 0.0
    nll_coefficient: float = 0.0

    def numbers(self) -> list[float]:
        """Return the numbers in the order in which kernels take them."""
        return [
            self.beta,
            self.length_weight,
            self.threshold,
            self.right,
            self.wrong,
            self.tie_offset,
        ]


@dataclass(frozen=True)
class PreferenceFormula:
    """A preference loss with its parameters, made by `fastalign.losses.formula`.

    Called on `PairLogprobs`, it computes the loss by its definition.
    """

    function: Callable[..., Tensor]  # the definition
    inputs: tuple[str, ...]  # fields of PairLogprobs that it takes by position
    parameters: Mapping[str, float]  # numbers that it takes by name
    kernel: PairLink | None  # None: no kernel computes it
    # Weight of the chosen response's cross-entropy, which is added to the function's loss.
    nll_coefficient: float = 0.0

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    @property
    def needs_reference(self) -> bool:
        """True if the loss compares with a reference model."""
        return "reference_chosen_logprob" in self.inputs

    @property
    def uses_ties(self) -> bool:
        """True if the loss distinguishes ties: pairs of which neither answer is better."""
        return "tie" in self.inputs

    @property
    def has_nll(self) -> bool:
        """True if the chosen response's cross-entropy is added to the function's loss."""
        return bool(self.nll_coefficient)

    def __call__(self, pairs: PairLogprobs) -> Tensor:
        """Return the losses (B,) of B pairs.

        Raises:
            ValueError: if the loss needs a reference and the pairs have none.
        """
        if self.needs_reference:
            pairs.logprobs()
        losses = self.function(*(getattr(pairs, name) for name in self.inputs), **self.parameters)
        return self.with_nll(losses, pairs, self.nll_coefficient)

    def with_nll(self, losses: Tensor, pairs: PairLogprobs, coefficient: float) -> Tensor:
        """Return the losses (B,) with the weighted cross-entropy of the chosen responses."""
        return losses + coefficient * pairs.chosen_nll() if coefficient else losses
