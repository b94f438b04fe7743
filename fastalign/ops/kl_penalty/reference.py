"""The definition of `kl_penalty`, in PyTorch, in the dtype of its arguments.

Legend: N tokens of R responses.
"""

import torch
from torch import Tensor

from fastalign.ops.segments import segment_sum


def last_tokens(bounds: Tensor, mask: Tensor | None, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The last token of each response whose mask is true, (R,), and whether there is one, (R,)."""
    latest = torch.arange(-1, num_tokens, device=bounds.device)
    if mask is not None:
        latest[1:].masked_fill_(~mask, -1)
        latest = latest.cummax(0).values
    last = latest[bounds[1:]]
    return last, last >= bounds[:-1]


def _log_ratio(logprob: Tensor, reference_logprob: Tensor, mask: Tensor | None) -> Tensor:
    log_ratio = logprob - reference_logprob
    return log_ratio if mask is None else log_ratio.masked_fill(~mask, 0.0)


def define(
    logprob: Tensor,  # (N,)
    reference_logprob: Tensor,  # (N,)
    bounds: Tensor,  # (R + 1,)
    score: Tensor | None,  # (R,)
    coefficient: float | Tensor,
    mask: Tensor | None,  # (N,) bool
    estimator: str,
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N,), (R,)
    """Reward, KL and its sums, the last two differentiable: the lines that are replaced."""
    log_ratio = _log_ratio(logprob, reference_logprob, mask)
    if estimator == "k1":
        kl = log_ratio
    elif estimator == "k2":
        kl = log_ratio.square() / 2
    else:
        kl = torch.expm1(-log_ratio) + log_ratio
    reward = -coefficient * kl.detach()
    sequence_kl = segment_sum(kl, bounds)
    if score is not None:
        last, found = last_tokens(bounds, mask, len(kl))
        # One place more, for the scores that no token takes.
        place = last.where(found, len(kl))
        reward = torch.cat([reward, reward.new_zeros(1)]).index_add(0, place, score)[:-1]
        sequence_kl = sequence_kl.masked_fill(~found, torch.nan)
    return reward, kl, sequence_kl


def forward(
    logprob: Tensor,
    reference_logprob: Tensor,
    bounds: Tensor,
    score: Tensor | None,
    coefficient: float,
    adaptive_coefficient: Tensor | None,
    mask: Tensor | None,
    estimator: str,
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N,), (R,)
    """See `define`; `adaptive_coefficient` (), if given, stands in for `coefficient`."""
    chosen = coefficient if adaptive_coefficient is None else adaptive_coefficient
    return define(logprob, reference_logprob, bounds, score, chosen, mask, estimator)


def backward(
    grad_kl: Tensor | None,  # (N,)
    grad_sequence_kl: Tensor | None,  # (R,)
    logprob: Tensor,  # (N,)
    reference_logprob: Tensor,  # (N,)
    bounds: Tensor,  # (R + 1,)
    mask: Tensor | None,  # (N,) bool
    estimator: str,
) -> Tensor:  # (N,)
    """By x = logprob - reference_logprob: 1 for k1, x for k2, 1 - exp(-x) for k3."""
    log_ratio = _log_ratio(logprob, reference_logprob, mask)
    if estimator == "k1":
        slope = torch.ones_like(log_ratio)
    else:
        slope = log_ratio if estimator == "k2" else -torch.expm1(-log_ratio)
    upstream = torch.zeros_like(slope) if grad_kl is None else grad_kl
    if grad_sequence_kl is not None:
        lengths = bounds.diff()
        upstream = upstream + grad_sequence_kl.repeat_interleave(lengths, output_size=len(slope))
    gradient = upstream * slope
    return gradient if mask is None else gradient.masked_fill(~mask, 0.0)
