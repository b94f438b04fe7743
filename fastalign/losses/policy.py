"""Losses of a policy and of its value function, per token and unreduced."""

import torch
from torch import Tensor

from fastalign.losses.arguments import check_positive, check_same_shape

# Bound of a log-ratio before its exponential, as in verl and NeMo-RL; float32 overflows at 89.
MAX_LOG_RATIO = 20.0


def negative_logprob(logprob: Tensor) -> Tensor:
    """Return -log p, (N,): the cross-entropy of each target token.

    Divide the sum by the number of target tokens of the whole batch, not of a micro-batch.
    """
    return -logprob


def probability_ratio(
    logprob: Tensor,  # (T,)
    old_logprob: Tensor,  # (T,)
    *,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Tensor:
    """Return exp(logprob - old_logprob), (T,), with the log-ratio clamped to +-max_log_ratio.

    Like any clamp's, the gradient of a token beyond it is zero.

    Raises:
        ValueError: if `max_log_ratio` is not positive.
    """
    check_positive(max_log_ratio=max_log_ratio)
    return (logprob - old_logprob).clamp(-max_log_ratio, max_log_ratio).exp()


def ppo_clip(
    logprob: Tensor,  # (T,)
    old_logprob: Tensor,  # (T,)
    advantage: Tensor,  # (T,)
    *,
    clip_range: float = 0.2,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Tensor:
    """Return PPO's clipped objective, negated (arXiv 1707.06347, eq. 7), (T,).

    -min(r A, clip(r, 1 - clip_range, 1 + clip_range) A), r = exp(logprob - old_logprob), bounded
    by `probability_ratio`: a token whose log-ratio is beyond `max_log_ratio` gets no gradient.

    Args:
        logprob: log-probs of the sampled tokens under the policy.
        old_logprob: log-probs under the policy that sampled; no gradient flows.
        advantage: advantage of each token; no gradient flows.
        clip_range: the paper's epsilon, in (0, 1).
        max_log_ratio: largest log-ratio and, negated, the smallest.

    Raises:
        ValueError: if shapes differ, the clip range is outside (0, 1), or the bound not positive.
    """
    check_same_shape(logprob=logprob, old_logprob=old_logprob, advantage=advantage)
    if not 0 < clip_range < 1:
        raise ValueError(f"clip_range: expected a number in (0, 1), got {clip_range}")
    ratio = probability_ratio(logprob, old_logprob.detach(), max_log_ratio=max_log_ratio)
    advantage = advantage.detach()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def value_clipped(
    value: Tensor,  # (T,)
    old_value: Tensor,  # (T,)
    returns: Tensor,  # (T,)
    *,
    clip_range: float = 0.2,
) -> Tensor:
    """Return PPO's clipped value loss, (T,), as in openai/lm-human-preferences (arXiv 1909.08593).

    max((v - R)^2, (clip(v, v_old - clip_range, v_old + clip_range) - R)^2) / 2.

    Args:
        value: value of each token's state.
        old_value: value from which the advantages were computed; no gradient flows.
        returns: target of the value; no gradient flows.
        clip_range: largest step from `old_value`, above 0; infinity does not clip.

    Raises:
        ValueError: if shapes differ, or the clip range is not positive.
    """
    check_same_shape(value=value, old_value=old_value, returns=returns)
    check_positive(clip_range=clip_range)
    old_value, returns = old_value.detach(), returns.detach()
    near = value.clamp(old_value - clip_range, old_value + clip_range)
    return torch.maximum((value - returns).square(), (near - returns).square()) / 2


def importance_weight(
    logprob: Tensor,  # (T,)
    sampler_logprob: Tensor,  # (T,)
    *,
    max_weight: float,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Tensor:
    """Return truncated importance weights, (T,), detached.

    min(exp(logprob - sampler_logprob), max_weight), bounded by `probability_ratio`: Ionides (2008),
    "Truncated importance sampling". They multiply the losses of tokens whose sampler had other
    log-probs than the trainer.

    Args:
        logprob: log-probs of the tokens under the trainer's policy, before its update.
        sampler_logprob: log-probs under the distribution that they were drawn from.
        max_weight: largest weight, above 0.
        max_log_ratio: largest log-ratio and, negated, the smallest.

    Raises:
        ValueError: if shapes differ, or a bound is not positive.
    """
    check_same_shape(logprob=logprob, sampler_logprob=sampler_logprob)
    check_positive(max_weight=max_weight)
    ratio = probability_ratio(logprob, sampler_logprob, max_log_ratio=max_log_ratio)
    return ratio.detach().clamp(max=max_weight)
