"""Losses of demonstrations, per token and unreduced."""

import torch
from torch import Tensor

from fastalign.losses.arguments import check_same_shape


def cross_entropy(
    logprob: Tensor,  # (N,)
    logsumexp: Tensor,  # (N,)
    mean_logit: Tensor,  # (N,)
    *,
    label_smoothing: float,
    target_weight: Tensor | None = None,  # (N,)
    mean_weight: float | Tensor = 1.0,
) -> Tensor:
    """Return the cross-entropy (N,) with label smoothing and class weights, as PyTorch's.

    -(1 - e) w_y log p_y - e mean_v(w_v log p_v), e = label_smoothing: Szegedy et al. (2016, arXiv
    1512.00567, section 7), with the weights of `torch.nn.functional.cross_entropy`. Since
    log p_v = z_v - logsumexp, the mean is mean_logit - mean_weight * logsumexp.

    Args:
        logprob: log-prob of each target.
        logsumexp: log-sum-exp of each row's logits.
        mean_logit: mean over the vocabulary of weight times logit.
        label_smoothing: share of the target that is spread over the vocabulary, in [0, 1).
        target_weight: weight of each target's class; None: 1.
        mean_weight: mean of the classes' weights.

    Raises:
        ValueError: if shapes differ, or the smoothing is out of its range.
    """
    check_same_shape(
        logprob=logprob, logsumexp=logsumexp, mean_logit=mean_logit, target_weight=target_weight
    )
    check_share(label_smoothing)
    weighted = -logprob if target_weight is None else -target_weight * logprob
    spread = mean_weight * logsumexp - mean_logit
    return (1.0 - label_smoothing) * weighted + label_smoothing * spread


def z_loss(logsumexp: Tensor) -> Tensor:
    """Return logsumexp^2, (N,): it keeps the softmax's denominator near 1.

    PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5), with a coefficient of 1e-4.
    """
    return torch.square(logsumexp)


def check_share(label_smoothing: float) -> None:
    """Raise ValueError unless 0 <= label_smoothing < 1."""
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(
            f"label_smoothing: expected 0 <= label_smoothing < 1, got {label_smoothing}"
        )
