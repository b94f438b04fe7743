"""The definition of `token_kl`, in PyTorch; float64 where either side is, else float32.

Legend: T rows, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.token_logprob.reference import LOWEST_LOGPROB, by_logits, transformed

# Log-probs that differ by more: one of them is a banned token's.
BANNED_DIFFERENCE = -0.5 * LOWEST_LOGPROB


class Inputs(NamedTuple):
    """The arguments of `token_kl`, as every backend takes them."""

    logits: Tensor  # (T, V)
    reference_logits: Tensor  # (T, V)
    temperature: Tensor | None  # (T,)
    ignored: Tensor | None  # (T,) bool
    softcap: float | None
    over_reference: bool
    backend: str


def divergence(
    log_p: Tensor,  # (T, V)
    log_q: Tensor,  # (T, V)
    over_reference: bool,
    ignored: Tensor | None,  # (T,) bool
) -> Tensor:  # (T,)
    """Return KL(p || q), or KL(q || p) with `over_reference`; differentiable; 0 where ignored."""
    own, other = (log_q, log_p) if over_reference else (log_p, log_q)
    difference = own.clamp(min=LOWEST_LOGPROB) - other.clamp(min=LOWEST_LOGPROB)
    kl = (own.exp() * difference).sum(-1).clamp(min=0.0)
    infinite = (difference > BANNED_DIFFERENCE).any(-1)
    if ignored is not None:
        infinite = infinite & ~ignored
    # an infinite KL has no gradient: the factor makes it NaN
    kl = (kl * torch.where(infinite, torch.nan, 1.0).to(kl.dtype)).masked_fill(infinite, torch.inf)
    return kl if ignored is None else kl.masked_fill(ignored, 0.0)


def _both(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return both sides' u in the wider dtype, and the gain."""
    sides = (inputs.logits, inputs.reference_logits)
    dtype = torch.promote_types(*(side.dtype for side in sides))
    (u, gain), (v, _) = (
        transformed(side.to(dtype), inputs.temperature, inputs.softcap) for side in sides
    )
    return u, v, gain


def forward(inputs: Inputs) -> list[Tensor]:  # each (T,)
    """Return the KL, and of each side the maximum of u and log sum exp(z - max z)."""
    *sides, gain = _both(inputs)
    log_probs, softmaxes = [], []
    for u in sides:
        maximum = u.amax(-1)
        shifted = (u - maximum[:, None]) * gain
        log_probs.append(shifted.log_softmax(-1))
        softmaxes += [maximum, shifted.logsumexp(-1)]
    log_p, log_q = log_probs
    return [divergence(log_p, log_q, inputs.over_reference, inputs.ignored), *softmaxes]


def backward(
    inputs: Inputs,
    kl: Tensor,  # (T,)
    maximum: Tensor,  # (T,)
    log_total: Tensor,  # (T,)
    reference_maximum: Tensor,  # (T,)
    reference_log_total: Tensor,  # (T,)
    grad_kl: Tensor,  # (T,)
) -> Tensor:  # (T, V), the logits' dtype
    """Return the gradient of the logits.

    d KL(p || q) / d z_v = p_v (log p_v - log q_v - KL);  d KL(q || p) / d z_v = p_v - q_v.
    """
    u, v, gain = _both(inputs)
    log_p = (u - maximum[:, None]) * gain - log_total[:, None]
    log_q = (v - reference_maximum[:, None]) * gain - reference_log_total[:, None]
    if inputs.over_reference:
        gradient = log_p.exp() - log_q.exp()
    else:
        difference = log_p.clamp(min=LOWEST_LOGPROB) - log_q.clamp(min=LOWEST_LOGPROB)
        gradient = log_p.exp() * (difference - kl[:, None])
    gradient = gradient * grad_kl.masked_fill(kl.isinf(), torch.nan)[:, None]
    gradient = by_logits(gradient, u, gain, inputs.softcap)
    if inputs.ignored is not None:
        gradient = gradient.masked_fill(inputs.ignored[:, None], 0.0)
    return gradient.to(inputs.logits.dtype)
