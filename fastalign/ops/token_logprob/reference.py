"""The definition of `token_logprob`, in PyTorch; float64 for float64 logits, else float32.

Legend: T rows, V vocabulary.
"""

import torch
from torch import Tensor

# Stands for -inf where 0 * -inf would be NaN.
LOWEST_LOGPROB = -1e30


def scaled_logits(
    logits: Tensor,  # (T, V)
    temperature: Tensor | None,  # (T,)
    softcap: float | None,
) -> Tensor:  # (T, V), float32 or float64
    """Z = softcap * tanh(logits / softcap) / temperature."""
    z = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if temperature is not None:
        z = z / temperature.to(z.dtype)[:, None]
    return z


def define(
    logits: Tensor,  # (T, V)
    targets: Tensor,  # (T,)
    temperature: Tensor | None,  # (T,)
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # (T,), (T,)
    """Log-prob and entropy, differentiable: the lines that the operation replaces."""
    logprob = scaled_logits(logits, temperature, softcap).log_softmax(-1)
    ignored = targets == ignore_index
    picked = logprob.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
    entropy = -(logprob.exp() * logprob.clamp(min=LOWEST_LOGPROB)).sum(-1)
    return picked.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


def forward(
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # each (T,)
    """Log-prob, entropy and log-sum-exp; zeros in the first two where ignored."""
    logprob, entropy = define(logits, targets, temperature, softcap, ignore_index)
    return logprob, entropy, scaled_logits(logits, temperature, softcap).logsumexp(-1)


def backward(
    grad_logprob: Tensor,  # (T,)
    grad_entropy: Tensor | None,  # (T,)
    logits: Tensor,  # (T, V)
    targets: Tensor,  # (T,)
    temperature: Tensor | None,  # (T,)
    softcap: float | None,
    ignore_index: int,
    logsumexp: Tensor,  # (T,)
    entropy: Tensor,  # (T,)
) -> Tensor:  # (T, V), the logits' dtype
    """D logprob / d z_v = 1[v = y] - p_v;  d entropy / d z_v = -p_v (log p_v + entropy)."""
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
