"""A pairwise loss as two things: the Python function that defines it, and what kernels compute."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from fastalign.ops.preference_loss.pairs import PairLogprobs


class LinkFunction(IntEnum):
    """What turns a pair's margin x into its loss, in the order of `csrc/preference_pair.h`."""

    LOGISTIC = 0  # right * softplus(threshold - x) + wrong * softplus(threshold + x)
    HINGE = 1  # max(0, 1 - x)
    SQUARE = 2  # (x - threshold)^2
    DAVIDSON = 3  # log(1 + e^-x + e^(tie_offset - x/2))
    ORPO = 4  # -mean log pi(c) + beta * softplus(log odds(r) - log odds(c))


@dataclass(frozen=True)
class PairLink:
    """A formula as the kernels compute it: a link of the margin x (ORPO's: of both log-probs).

    x = beta * h + length_weight * (|c| - |r|), with h the difference of log-ratios; where
    `per_token`, of means over tokens. A tie has `right` and `wrong` 1 and loses `tie_offset` less;
    in Davidson's model also x/2 more.
    """

    link: LinkFunction
    per_token: bool = False
    beta: float = 1.0
    length_weight: float = 0.0
    threshold: float = 0.0
    right: float = 1.0
    wrong: float = 0.0
    tie_offset: float = 0.0

    def numbers(self) -> list[float]:
        """The numbers in the order in which kernels take them."""
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
    """A pairwise loss with its parameters; `fastalign.losses.formula` makes them.

    Called on `PairLogprobs` it is the loss, by its definition.
    """

    function: Callable[..., Tensor]  # the definition
    inputs: tuple[str, ...]  # the fields of PairLogprobs that it takes by position
    parameters: Mapping[str, float]  # what it takes by name
    kernel: PairLink | None  # None: no kernel computes it

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with a reference model."""
        return "reference_chosen_logprob" in self.inputs

    @property
    def uses_ties(self) -> bool:
        """Whether it has a place for pairs of which neither answer is better."""
        return "tie" in self.inputs

    def __call__(self, pairs: PairLogprobs) -> Tensor:
        """Losses (B,) of B pairs.

        Raises:
            ValueError: It needs a reference, and the pairs have none.
        """
        if self.needs_reference:
            pairs.logprobs()
        return self.function(*(getattr(pairs, name) for name in self.inputs), **self.parameters)
