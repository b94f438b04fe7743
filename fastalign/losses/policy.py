"""Losses of a policy and of its value function, per token and unreduced."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.losses.arguments import check_positive, check_range, check_same_shape
from fastalign.ops.segments import segment_sum

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


class PolicyTerms(NamedTuple):
    """A policy loss of T tokens, and what its metrics are made of."""

    losses: Tensor
    """(T,), unreduced."""
    log_ratio: Tensor
    """(T,), detached: of each token, or the mean of its response; before any bound."""
    clipped: Tensor
    """(T,) bool: the loss is not that of the unclipped ratio."""


def ppo_clip(
    logprob: Tensor,  # (T,)
    old_logprob: Tensor,  # (T,)
    advantage: Tensor,  # (T,)
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Tensor:
    """Return PPO's clipped objective, negated (arXiv 1707.06347, eq. 7), (T,).

    -min(r A, clip(r, 1 - clip_range, 1 + clip_range_high) A), r = exp(logprob - old_logprob),
    bounded by `probability_ratio`: a token whose log-ratio is beyond `max_log_ratio` gets no
    gradient. Two bounds are DAPO's clip-higher (arXiv 2503.14476, eq. 10). With a `dual_clip` c a
    token of negative advantage loses at most c |A| (Ye et al. 2020, arXiv 1912.09729, eq. 5).

    Args:
        logprob: log-probs of the sampled tokens under the policy.
        old_logprob: log-probs under the policy that sampled; no gradient flows.
        advantage: advantage of each token; no gradient flows.
        clip_range: the paper's epsilon, in (0, 1).
        clip_range_high: the upper bound's, above 0; None: the same.
        dual_clip: the largest ratio of a token whose advantage is negative, above 1; None: none.
        max_log_ratio: largest log-ratio and, negated, the smallest.

    Raises:
        ValueError: if shapes differ, or a bound is out of its range.
    """
    check_same_shape(logprob=logprob, old_logprob=old_logprob, advantage=advantage)
    return clip_terms(
        logprob - old_logprob.detach(),
        advantage,
        clip_range=clip_range,
        clip_range_high=clip_range_high,
        dual_clip=dual_clip,
        max_log_ratio=max_log_ratio,
    ).losses


def clip_terms(
    log_ratio: Tensor,  # (T,)
    advantage: Tensor,  # (T,)
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> PolicyTerms:
    """Return the losses of `ppo_clip` for given log-ratios, and which tokens are clipped."""
    high = clip_range if clip_range_high is None else clip_range_high
    if not 0 < clip_range < 1:
        raise ValueError(f"clip_range: expected a number in (0, 1), got {clip_range}")
    check_positive(clip_range_high=high, max_log_ratio=max_log_ratio)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip: expected a number above 1, got {dual_clip}")
    advantage = advantage.detach()
    ratio = log_ratio.clamp(-max_log_ratio, max_log_ratio).exp()
    plain = ratio * advantage
    objective = torch.minimum(plain, ratio.clamp(1 - clip_range, 1 + high) * advantage)
    if dual_clip is not None:
        bounded = torch.maximum(objective, dual_clip * advantage)
        objective = torch.where(advantage < 0, bounded, objective)
    return PolicyTerms(-objective, log_ratio.detach(), (objective != plain).detach())


def gspo_clip(
    logprob: Tensor,  # (T,)
    old_logprob: Tensor,  # (T,)
    advantage: Tensor,  # (T,)
    bounds: Tensor,  # (R + 1,) integers
    *,
    clip_range: float = 3e-4,
    clip_range_high: float | None = 4e-4,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Tensor:
    """Return GSPO's losses (arXiv 2507.18071, eq. 5), (T,): those of `ppo_clip` by sequence ratios.

    The ratio of every token is that of its whole response (`sequence_log_ratio`), so a response is
    clipped as a whole, and its gradient is shared by its tokens alike. Average the losses over
    each response's tokens first for the paper's objective. The default ranges are the paper's.

    Args:
        logprob: log-probs of the sampled tokens under the policy.
        old_logprob: log-probs under the policy that sampled; no gradient flows.
        advantage: advantage of each token; no gradient flows. The paper's is the same for all
            tokens of a response.
        bounds: response r owns the tokens bounds[r] to bounds[r + 1].
        clip_range: distance of the lower bound from 1.
        clip_range_high: distance of the upper bound from 1; None: the same.
        max_log_ratio: largest mean log-ratio and, negated, the smallest.

    Raises:
        ValueError: if shapes differ, or a bound is out of its range.
    """
    check_same_shape(logprob=logprob, old_logprob=old_logprob, advantage=advantage)
    return clip_terms(
        sequence_log_ratio(logprob, old_logprob, bounds),
        advantage,
        clip_range=clip_range,
        clip_range_high=clip_range_high,
        max_log_ratio=max_log_ratio,
    ).losses


def sequence_log_ratio(
    logprob: Tensor,  # (T,)
    old_logprob: Tensor,  # (T,)
    bounds: Tensor,  # (R + 1,) integers
    length: Tensor | None = None,  # (R,)
) -> Tensor:
    """Return for each token the mean log-ratio of its response, (T,): log of GSPO's eq. 7.

    `length` is the number of tokens of each response that count; None: all.
    """
    sizes = bounds.diff()
    total = segment_sum(logprob - old_logprob.detach(), bounds)
    mean = total / (sizes if length is None else length).clamp(min=1).to(total.dtype)
    return mean.repeat_interleave(sizes, output_size=len(logprob))


def cispo(
    logprob: Tensor,  # (T,)
    old_logprob: Tensor,  # (T,)
    advantage: Tensor,  # (T,)
    *,
    max_ratio: float = 5.0,
    min_ratio: float = 0.0,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Tensor:
    """Return CISPO's losses (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5), (T,).

    -clip(r, min_ratio, max_ratio) A logprob, r = exp(logprob - old_logprob), without a gradient
    through r: the weight of a token is clipped, but none loses its gradient.

    Args:
        logprob: log-probs of the sampled tokens under the policy.
        old_logprob: log-probs under the policy that sampled; no gradient flows.
        advantage: advantage of each token; no gradient flows.
        max_ratio: largest ratio, the paper's 1 + epsilon_high; 5 is that of ScaleRL (arXiv
            2510.13786).
        min_ratio: smallest ratio, the paper's 1 - epsilon_low, which it does not use.
        max_log_ratio: largest log-ratio and, negated, the smallest.

    Raises:
        ValueError: if shapes differ, or not 0 <= min_ratio < max_ratio.
    """
    check_same_shape(logprob=logprob, old_logprob=old_logprob, advantage=advantage)
    return cispo_terms(
        logprob,
        old_logprob,
        advantage,
        max_ratio=max_ratio,
        min_ratio=min_ratio,
        max_log_ratio=max_log_ratio,
    ).losses


def cispo_terms(
    logprob: Tensor,  # (T,)
    old_logprob: Tensor,  # (T,)
    advantage: Tensor,  # (T,)
    *,
    max_ratio: float,
    min_ratio: float = 0.0,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> PolicyTerms:
    """Return the losses of `cispo`, and which tokens' ratios are clipped."""
    check_range(min_ratio=min_ratio, max_ratio=max_ratio)
    log_ratio = (logprob - old_logprob).detach()
    ratio = log_ratio.clamp(-max_log_ratio, max_log_ratio).exp()
    weight = ratio.clamp(min_ratio, max_ratio)
    return PolicyTerms(-weight * advantage.detach() * logprob, log_ratio, weight != ratio)


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
    bounds: Tensor | None = None,  # (R + 1,) integers
    *,
    max_weight: float,
    min_weight: float = 0.0,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Tensor:
    """Return truncated importance weights, (T,), detached.

    clip(exp(logprob - sampler_logprob), min_weight, max_weight), bounded by `probability_ratio`:
    Ionides (2008), "Truncated importance sampling". They multiply the losses of tokens whose
    sampler had other log-probs than the trainer. With `bounds` a token's weight is that of its
    whole response, whose log-ratio is the sum of its tokens'.

    Args:
        logprob: log-probs of the tokens under the trainer's policy, before its update.
        sampler_logprob: log-probs under the distribution that they were drawn from.
        bounds: response r owns the tokens bounds[r] to bounds[r + 1]; None: tokens are weighted.
        max_weight: largest weight, above `min_weight`.
        min_weight: smallest weight, not below 0.
        max_log_ratio: largest log-ratio and, negated, the smallest.

    Raises:
        ValueError: if shapes differ, or a bound is out of its range.
    """
    check_positive(max_weight=max_weight)
    check_range(min_weight=min_weight, max_weight=max_weight)
    ratio = _sampling_ratio(logprob, sampler_logprob, bounds, max_log_ratio)
    return ratio.clamp(min_weight, max_weight)


def masked_importance_weight(
    logprob: Tensor,  # (T,)
    sampler_logprob: Tensor,  # (T,)
    bounds: Tensor | None = None,  # (R + 1,) integers
    *,
    max_weight: float,
    min_weight: float = 0.0,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Tensor:
    """Return importance weights, (T,), detached, that are 0 outside of [min_weight, max_weight].

    A token that the trainer and its sampler see too differently is left out: IcePop (arXiv
    2510.18855); with `bounds` a whole response is (TRL's and verl's sequence mask). The arguments
    are those of `importance_weight`.

    Raises:
        ValueError: if shapes differ, or a bound is out of its range.
    """
    check_positive(max_weight=max_weight)
    check_range(min_weight=min_weight, max_weight=max_weight)
    ratio = _sampling_ratio(logprob, sampler_logprob, bounds, max_log_ratio)
    return torch.where((ratio < min_weight) | (ratio > max_weight), 0.0, ratio)


def _sampling_ratio(
    logprob: Tensor, sampler_logprob: Tensor, bounds: Tensor | None, max_log_ratio: float
) -> Tensor:
    """Return the ratio of each token, or of its response, (T,), detached."""
    check_same_shape(logprob=logprob, sampler_logprob=sampler_logprob)
    if bounds is None:
        return probability_ratio(logprob, sampler_logprob, max_log_ratio=max_log_ratio).detach()
    ratio = probability_ratio(
        segment_sum(logprob, bounds),
        segment_sum(sampler_logprob, bounds),
        max_log_ratio=max_log_ratio,
    )
    return ratio.detach().repeat_interleave(bounds.diff(), output_size=len(logprob))
