"""A pairwise loss of this package with its parameters, as `ops.preference_loss` takes it."""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastalign.losses import preference, preference_length, preference_reference_free
from fastalign.ops.preference_loss import LinkFunction, PairLink, PairLogprobs, PreferenceFormula


def formula(loss: Callable[..., Tensor], **parameters: float) -> PreferenceFormula:
    """The formula of a pairwise loss: `formula(dpo, beta=0.1)`.

    For `preference_loss`, and for `fused_linear_preference_loss` in place of a function of pairs.

    Args:
        loss: One of this package's functions of preference pairs.
        parameters: Its parameters; those that are not given have its defaults.

    Raises:
        ValueError: Not one of those functions, a parameter that it has not, or a value that it
            refuses.
    """
    link = _LINKS.get(loss)
    if link is None:
        known = ", ".join(function.__name__ for function in _LINKS)
        raise ValueError(
            f"loss: expected one of {known} of fastalign.losses, "
            f"got {getattr(loss, '__name__', loss)!r}"
        )
    inputs = []
    values = {}
    for name, parameter in inspect.signature(loss).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            values[name] = float(parameters.get(name, parameter.default))
        else:
            inputs.append(name)
    for name, value in parameters.items():
        if name not in values:
            raise ValueError(
                f"{name}: expected a parameter of {loss.__name__} ({', '.join(values)}), "
                f"got {name}={value}"
            )
    loss(*(getattr(_NO_PAIRS, name) for name in inputs), **values)  # its own checks
    return PreferenceFormula(loss, tuple(inputs), values, link(**values))


def check_pair_loss(pair_loss: Callable[[PairLogprobs], Tensor]) -> None:
    """Checks that a loss takes pairs: one of this package's functions takes log-probs.

    Raises:
        ValueError: It is one of those, which `formula` makes into what is wanted.
    """
    if any(pair_loss is function for function in _LINKS):
        name = getattr(pair_loss, "__name__", "")
        raise ValueError(f"pair_loss: expected a function of pairs or formula({name}), got {name}")


_NO_PAIRS = PairLogprobs.from_responses(torch.zeros(0), torch.zeros(0), torch.zeros(0).long())


def _robust(beta: float, label_smoothing: float) -> PairLink:
    clean = 1.0 - 2.0 * label_smoothing
    return PairLink(
        LinkFunction.LOGISTIC,
        beta=beta,
        right=(1.0 - label_smoothing) / clean,
        wrong=-label_smoothing / clean,
    )


# What the kernels compute for each definition; its tests hold the two together.
_LINKS: dict[Callable[..., Tensor], Callable[..., PairLink]] = {
    preference.dpo: lambda beta: PairLink(LinkFunction.LOGISTIC, beta=beta),
    preference.dpo_label_smoothed: lambda beta, label_smoothing: PairLink(
        LinkFunction.LOGISTIC, beta=beta, right=1.0 - label_smoothing, wrong=label_smoothing
    ),
    preference.dpo_robust: _robust,
    preference.hinge: lambda beta: PairLink(LinkFunction.HINGE, beta=beta),
    preference.ipo_sum: lambda beta: PairLink(LinkFunction.SQUARE, threshold=1.0 / (2.0 * beta)),
    preference_length.ipo_mean: lambda beta: PairLink(
        LinkFunction.SQUARE, per_token=True, threshold=1.0 / (2.0 * beta)
    ),
    preference_length.dpo_length_normalised: lambda beta: PairLink(
        LinkFunction.LOGISTIC, per_token=True, beta=beta
    ),
    preference_length.dpo_length_penalised: lambda beta, alpha: PairLink(
        LinkFunction.LOGISTIC, beta=beta, length_weight=alpha
    ),
    preference_reference_free.simpo: lambda beta, gamma: PairLink(
        LinkFunction.LOGISTIC, per_token=True, beta=beta, threshold=gamma
    ),
    preference_reference_free.orpo: lambda beta: PairLink(
        LinkFunction.ORPO, per_token=True, beta=beta
    ),
    preference.dpo_rao_kupper: lambda beta, nu: PairLink(
        LinkFunction.LOGISTIC,
        beta=beta,
        threshold=math.log(nu),
        tie_offset=math.log(nu * nu - 1.0),
    ),
    preference.dpo_davidson: lambda beta, nu: PairLink(
        LinkFunction.DAVIDSON, beta=beta, tie_offset=math.log(2.0 * nu)
    ),
}
