"""The definition of `kl_penalty`, in PyTorch, in the dtype of its arguments.

Legend: N tokens of R responses.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.segments import segment_sum

# A lower log-ratio counts as this one in k3, whose exponential would overflow.
LOWEST_LOG_RATIO = -20.0


class Inputs(NamedTuple):
    """The arguments of `kl_penalty`, as every backend takes them."""

    logprob: Tensor  # (N,)
    reference_logprob: Tensor  # (N,)
    bounds: Tensor  # (R + 1,) int64
    score: Tensor | None  # (R,)
    coefficient: float
    adaptive_coefficient: Tensor | None  # (), in place of `coefficient`
    mask: Tensor | None  # (N,) bool
    estimator: str
    max_k3: float
    backend: str


def last_tokens(bounds: Tensor, mask: Tensor | None, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return each response's last token whose mask is true, (R,), and if there is one, (R,)."""
    latest = torch.arange(-1, num_tokens, device=bounds.device)
    if mask is not None:
        latest[1:].masked_fill_(~mask, -1)
        latest = latest.cummax(0).values
    last = latest[bounds[1:]]
    return last, last >= bounds[:-1]


def _log_ratio(logprob: Tensor, reference_logprob: Tensor, mask: Tensor | None) -> Tensor:
    log_ratio = logprob - reference_logprob
    return log_ratio if mask is None else log_ratio.masked_fill(~mask, 0.0)


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N,), (R,)
    """Return the reward, the KL and its sums."""
    logprob, reference_logprob, bounds, score, constant, adaptive, mask, estimator, *_ = inputs
    coefficient = constant if adaptive is None else adaptive
    log_ratio = _log_ratio(logprob, reference_logprob, mask)
    if estimator == "k1":
        kl = log_ratio
    elif estimator == "k2":
        kl = log_ratio.square() / 2
    else:
        bounded = log_ratio.clamp(min=LOWEST_LOG_RATIO)
        kl = (torch.expm1(-bounded) + bounded).clamp(max=inputs.max_k3)
    reward = -coefficient * kl.detach()
    sequence_kl = segment_sum(kl, bounds)
    if score is not None:
        last, found = last_tokens(bounds, mask, len(kl))
        # One extra element takes the scores of responses without a counted token.
        place = last.where(found, len(kl))
        reward = torch.cat([reward, reward.new_zeros(1)]).index_add(0, place, score)[:-1]
        sequence_kl = sequence_kl.masked_fill(~found, torch.nan)
    return reward, kl, sequence_kl


def backward(
    inputs: Inputs,
    grad_kl: Tensor | None,  # (N,)
    grad_sequence_kl: Tensor | None,  # (R,)
) -> Tensor:  # (N,)
    """Return the gradient of the log-probs.

    The derivative by x = logprob - reference_logprob is 1 for k1, x for k2, 1 - exp(-x) for k3,
    and 0 where a bound changes that estimate.
    """
    mask, estimator = inputs.mask, inputs.estimator
    log_ratio = _log_ratio(inputs.logprob, inputs.reference_logprob, mask)
    if estimator == "k1":
        slope = torch.ones_like(log_ratio)
    elif estimator == "k2":
        slope = log_ratio
    else:
        exponential = torch.expm1(-log_ratio)
        clamped = (log_ratio < LOWEST_LOG_RATIO) | (exponential + log_ratio > inputs.max_k3)
        slope = -exponential.masked_fill(clamped, 0.0)
    upstream = torch.zeros_like(slope) if grad_kl is None else grad_kl
    if grad_sequence_kl is not None:
        lengths = inputs.bounds.diff()
        upstream = upstream + grad_sequence_kl.repeat_interleave(lengths, output_size=len(slope))
    gradient = upstream * slope
    return gradient if mask is None else gradient.masked_fill(~mask, 0.0)
