"""The definition of `token_logprob`, in PyTorch; float64 for float64 logits, else float32.

Legend: T rows, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Replaces -inf where 0 * -inf would be NaN.
LOWEST_LOGPROB = -1e30


class Inputs(NamedTuple):
    """The arguments of `token_logprob`, as every backend takes them."""

    logits: Tensor  # (T, V)
    targets: Tensor  # (T,)
    temperature: Tensor | None  # (T,)
    softcap: float | None
    ignore_index: int
    backend: str


def scaled_logits(
    logits: Tensor,  # (T, V)
    temperature: Tensor | None,  # (T,)
    softcap: float | None,
) -> Tensor:  # (T, V), float32 or float64
    """Return z = softcap * tanh(logits / softcap) / temperature."""
    z = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if temperature is not None:
        z = z / temperature.to(z.dtype)[:, None]
    return z


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:  # each (T,)
    """Return log-prob, entropy and log-sum-exp; zeros in the first two where ignored."""
    z = scaled_logits(inputs.logits, inputs.temperature, inputs.softcap)
    logprob = z.log_softmax(-1)
    ignored = inputs.targets == inputs.ignore_index
    picked = logprob.gather(1, inputs.targets.masked_fill(ignored, 0)[:, None])[:, 0]
    entropy = -(logprob.exp() * logprob.clamp(min=LOWEST_LOGPROB)).sum(-1)
    return picked.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0), z.logsumexp(-1)


def backward(
    inputs: Inputs,
    entropy: Tensor,  # (T,)
    logsumexp: Tensor,  # (T,)
    grad_logprob: Tensor,  # (T,)
    grad_entropy: Tensor | None,  # (T,)
) -> Tensor:  # (T, V), the logits' dtype
    """Return the gradient of the logits.

    d logprob / d z_v = 1[v = y] - p_v;  d entropy / d z_v = -p_v (log p_v + entropy).
    """
    logits, targets, temperature, softcap, ignore_index, _ = inputs
    z = scaled_logits(logits, temperature, softcap)
    log_p = z - logsumexp[:, None]
    p = log_p.exp()
    ignored = (targets == ignore_index)[:, None]
    gradient = -grad_logprob[:, None] * p
    gradient.scatter_add_(1, targets.masked_fill(ignored[:, 0], 0)[:, None], grad_logprob[:, None])
    if grad_entropy is not None:
        bracket = log_p.clamp(min=LOWEST_LOGPROB) + entropy[:, None]
        gradient = gradient - grad_entropy[:, None] * p * bracket
    if temperature is not None:
        gradient = gradient / temperature.to(z.dtype)[:, None]
    if softcap is not None:
        gradient = gradient * (1 - torch.tanh(logits.to(z.dtype) / softcap).square())
    return gradient.masked_fill(ignored, 0.0).to(logits.dtype)
