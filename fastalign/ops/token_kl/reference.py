"""The definition of `token_kl`, in PyTorch; float64 where either side is, else float32.

Legend: T rows, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.token_logprob.reference import LOWEST_LOGPROB, scaled_logits

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


def _both(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return both sides' z, in the wider dtype."""
    logits, reference_logits, temperature, _, softcap, *_ = inputs
    dtype = torch.promote_types(logits.dtype, reference_logits.dtype)
    return (
        scaled_logits(logits.to(dtype), temperature, softcap),
        scaled_logits(reference_logits.to(dtype), temperature, softcap),
    )


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:  # each (T,)
    """Return the KL and the two log-sum-exps."""
    z, r = _both(inputs)
    log_p, log_q = z.log_softmax(-1), r.log_softmax(-1)
    kl = divergence(log_p, log_q, inputs.over_reference, inputs.ignored)
    return kl, z.logsumexp(-1), r.logsumexp(-1)


def backward(
    inputs: Inputs,
    kl: Tensor,  # (T,)
    logsumexp: Tensor,  # (T,)
    reference_logsumexp: Tensor,  # (T,)
    grad_kl: Tensor,  # (T,)
) -> Tensor:  # (T, V), the logits' dtype
    """Return the gradient of the logits.

    d KL(p || q) / d z_v = p_v (log p_v - log q_v - KL);  d KL(q || p) / d z_v = p_v - q_v.
    """
    logits, _, temperature, ignored, softcap, over_reference, _ = inputs
    z, r = _both(inputs)
    log_p, log_q = z - logsumexp[:, None], r - reference_logsumexp[:, None]
    if over_reference:
        gradient = log_p.exp() - log_q.exp()
    else:
        difference = log_p.clamp(min=LOWEST_LOGPROB) - log_q.clamp(min=LOWEST_LOGPROB)
        gradient = log_p.exp() * (difference - kl[:, None])
    gradient = gradient * grad_kl.masked_fill(kl.isinf(), torch.nan)[:, None]
    if temperature is not None:
        gradient = gradient / temperature.to(z.dtype)[:, None]
    if softcap is not None:
        gradient = gradient * (1 - torch.tanh(logits.to(z.dtype) / softcap).square())
    if ignored is not None:
        gradient = gradient.masked_fill(ignored[:, None], 0.0)
    return gradient.to(logits.dtype)
