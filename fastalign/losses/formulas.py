"""The table of preference losses, and a loss of it with its parameters as a formula."""

import inspect
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from fastalign.losses.arguments import check_not_negative
from fastalign.ops.preference_loss import PairLink, PairLogprobs, PreferenceFormula

PairFunction = TypeVar("PairFunction", bound=Callable[..., Tensor])
MakeLink = Callable[..., PairLink | None]

# Each preference loss with the maker of its kernel's member; None: no kernel computes it.
_LOSSES: dict[Callable[..., Tensor], MakeLink | None] = {}
_NO_PAIRS = PairLogprobs.from_responses(torch.zeros(0), torch.zeros(0), torch.zeros(0).long())


def pair_loss(link: MakeLink | None = None) -> Callable[[PairFunction], PairFunction]:
    """Register the decorated function as a preference loss, and return it unchanged.

    Its positional parameters are fields of `PairLogprobs`; its keyword parameters are numbers with
    defaults, each an `Annotated[float, HELP]`.

    Args:
        link: the function from the loss's parameters to what the kernels of `ops.preference_loss`
            compute, or to None where they do not; None: the loss is computed by the function
            itself, on any device.
    """

    def register(function: PairFunction) -> PairFunction:
        _LOSSES[function] = link
        return function

    return register


def pair_losses() -> dict[str, Callable[..., Tensor]]:
    """Return every registered preference loss by its name, in the order of definition."""
    return {function.__name__: function for function in _LOSSES}


def formula(loss: Callable[..., Tensor], **parameters: float) -> PreferenceFormula:
    """Return the formula of a preference loss with its parameters: `formula(dpo, beta=0.1)`.

    `preference_loss` takes a formula, and so does `fused_linear_preference_loss` in place of a
    function of pairs.

    Args:
        loss: a preference loss of this package.
        parameters: its parameters; the others have the function's defaults. Every loss also has
            `nll_coefficient`, the weight of the chosen response's mean cross-entropy that is added
            to it (RPO, arXiv 2404.19733, eq. 1): by default 0, unless it is in the function.

    Raises:
        ValueError: if `loss` is not registered, has no such parameter, or refuses a value.
    """
    if loss not in _LOSSES:
        raise ValueError(
            f"loss: expected one of {', '.join(pair_losses())} of fastalign.losses, "
            f"got {getattr(loss, '__name__', loss)!r}"
        )
    signature = inspect.signature(loss).parameters.values()
    inputs = tuple(one.name for one in signature if one.kind is not one.KEYWORD_ONLY)
    defaults = {one.name: one.default for one in signature if one.kind is one.KEYWORD_ONLY}
    nll_coefficient = 0.0
    if "nll_coefficient" not in defaults:
        nll_coefficient = float(parameters.pop("nll_coefficient", 0.0))
        check_not_negative(nll_coefficient=nll_coefficient)
    for name, value in parameters.items():
        if name not in defaults:
            raise ValueError(
                f"{name}: expected a parameter of {loss.__name__} ({', '.join(defaults)}), "
                f"got {name}={value}"
            )
    values = {name: float(value) for name, value in {**defaults, **parameters}.items()}
    loss(*(getattr(_NO_PAIRS, name) for name in inputs), **values)  # checks the parameters
    link = _LOSSES[loss]
    kernel = None if link is None else link(**values)
    return PreferenceFormula(loss, inputs, values, kernel, nll_coefficient)


def check_pair_loss(given: Callable[[PairLogprobs], Tensor]) -> None:
    """Raise ValueError for a preference loss of this package in place of its formula."""
    if any(given is function for function in _LOSSES):
        name = getattr(given, "__name__", "")
        raise ValueError(f"pair_loss: expected a function of pairs or formula({name}), got {name}")
