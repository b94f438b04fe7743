"""The definition of `token_logprob`, in PyTorch; float64 for float64 logits, else float32.

Legend: T rows, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.target_columns import target_columns

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


def transformed(
    logits: Tensor,  # (T, V)
    temperature: Tensor | None,  # (T,)
    softcap: float | None,
) -> tuple[Tensor, Tensor | float]:  # (T, V) float32 or float64, and a number or (T, 1)
    """Return u and the gain: z = gain * u = softcap * tanh(logits / softcap) / temperature.

    The row's maximum is subtracted from u, not from z: a large offset that all logits of a row
    have in common would make the rounding errors of a product with it as large as differences.
    """
    u = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    gain: Tensor | float = 1.0
    if softcap is not None:
        u, gain = torch.tanh(u / softcap), softcap
    if temperature is not None:
        gain = gain / temperature.to(u.dtype)[:, None]
    return u, gain


def by_logits(
    gradient: Tensor,  # (T, V)
    u: Tensor,  # (T, V)
    gain: Tensor | float,  # or (T, 1)
    softcap: float | None,
) -> Tensor:
    """Return the gradient of the logits from that of z."""
    gradient = gradient * gain
    return gradient if softcap is None else gradient * ((1 - u.square()) / softcap)


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # each (T,)
    """Return log-prob, entropy, maximum of u and log sum exp(z - max z).

    The first two are zeros where ignored; the log-prob is NaN where the target is no column.
    """
    u, gain = transformed(inputs.logits, inputs.temperature, inputs.softcap)
    maximum = u.amax(-1)
    shifted = (u - maximum[:, None]) * gain
    # PyTorch's log_softmax adds up the terms of a large vocabulary one by one; `sum` adds pairwise.
    log_total = shifted.exp().sum(-1).log()
    logprob = shifted - log_total[:, None]
    ignored = inputs.targets == inputs.ignore_index
    columns, factor = target_columns(inputs.targets, ignored, u.shape[1], u.dtype)
    picked = (logprob.gather(1, columns) * factor)[:, 0]
    entropy = -(logprob.exp() * logprob.clamp(min=LOWEST_LOGPROB)).sum(-1)
    picked, entropy = picked.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)
    return picked, entropy, maximum, log_total


def backward(
    inputs: Inputs,
    logprob: Tensor,  # (T,)
    entropy: Tensor,  # (T,)
    maximum: Tensor,  # (T,)
    log_total: Tensor,  # (T,)
    grad_logprob: Tensor,  # (T,)
    grad_entropy: Tensor | None,  # (T,)
) -> Tensor:  # (T, V), the logits' dtype
    """Return the gradient of the logits.

    d logprob / d z_v = 1[v = y] - p_v;  d entropy / d z_v = -p_v (log p_v + entropy). A row whose
    target is no column is NaN.
    """
    logits, targets, temperature, softcap, ignore_index, _ = inputs
    u, gain = transformed(logits, temperature, softcap)
    log_p = (u - maximum[:, None]) * gain - log_total[:, None]
    p = log_p.exp()
    ignored = (targets == ignore_index)[:, None]
    columns, factor = target_columns(targets, ignored[:, 0], u.shape[1], u.dtype)
    g = grad_logprob[:, None] * factor
    # 1 - p from the log-prob: exact where p is near 1
    at_target = -torch.expm1(logprob)[:, None] * g
    gradient = (-g * p).scatter_(1, columns, at_target)
    if grad_entropy is not None:
        bracket = log_p.clamp(min=LOWEST_LOGPROB) + entropy[:, None]
        gradient = gradient - grad_entropy[:, None] * p * bracket
    gradient = by_logits(gradient, u, gain, softcap)
    return gradient.masked_fill(ignored, 0.0).to(logits.dtype)
