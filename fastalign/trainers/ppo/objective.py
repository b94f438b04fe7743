"""Rewards of tokens from scores and KL, the KL's coefficient, metrics of a step's rollouts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops import kl_penalty
from fastalign.ops.segments import segment_sum
from fastalign.runs.metrics import Metrics
from fastalign.trainers.ppo.config import KLPenalty
from fastalign.trainers.ppo.record import TokenRecord


@dataclass(frozen=True)
class Penalised:
    """Rewards of a step's tokens, and the KL they were reduced by; N tokens, R responses.

    Attributes:
        kl: (N,) estimate of the KL at each token.
        sequence_kl: (R,) its sums over responses.
        reward: (N,) -coefficient * kl if the KL is in the reward, plus the score at each response's
            last token.
    """

    kl: Tensor
    sequence_kl: Tensor
    reward: Tensor


def penalise(
    record: TokenRecord,
    score: Tensor,  # (R,)
    config: KLPenalty,
    coefficient: float,
) -> Penalised:
    """Return the reward of every token (arXiv 2203.02155, eq. 2), by the chosen KL estimate."""
    in_reward = coefficient if config.in_reward else 0.0
    if config.estimator != "full":
        found = kl_penalty(
            record.logprob,
            record.reference_logprob,
            record.bounds,
            score,
            coefficient=in_reward,
            estimator=config.estimator,
        )
        return Penalised(found.kl, found.sequence_kl, found.reward)
    assert record.full_kl is not None
    reward = -in_reward * record.full_kl
    reward[record.bounds[1:] - 1] += score
    return Penalised(record.full_kl, segment_sum(record.full_kl, record.bounds), reward)


def exact_kl_coefficient(config: KLPenalty, coefficient: float, scale: float) -> float:
    """Return the weight of the exact KL in the loss; 0 if the KL is estimated from samples.

    The exact KL belongs into the loss even where it is in the reward too: -KL_t as a reward is the
    same for every token that could be drawn at t, so a policy gradient sees the token's effect on
    the KL of later states and misses the derivative of KL_t itself. That derivative, in the
    advantage's scale, makes it the gradient of the whole KL (arXiv 2504.10637). k1 does not need
    it: its derivative has mean 0.
    """
    if config.estimator != "full":
        return 0.0
    return coefficient * scale if config.in_reward else coefficient


def adapted_coefficient(
    coefficient: float, kl: float, config: KLPenalty, num_responses: int
) -> float:
    """Return the next step's coefficient (arXiv 1909.08593, section 2.2).

    error = clip(kl / target - 1, -0.2, 0.2); coefficient * (1 + error * responses / horizon).
    """
    if config.target is None:
        return coefficient
    error = min(max(kl / config.target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_responses / config.horizon)


def objective_metrics(
    record: TokenRecord, found: Penalised, score: Tensor, config: KLPenalty, coefficient: float
) -> Metrics:
    """Return TRL's `objective/...` (means over responses), and `entropy` (over tokens)."""
    penalty = coefficient if config.in_reward else 0.0
    non_score = -penalty * found.sequence_kl
    return {
        "objective/kl": found.sequence_kl.mean().item(),
        "objective/entropy": -segment_sum(record.logprob, record.bounds).mean().item(),
        "objective/non_score_reward": non_score.mean().item(),
        "objective/rlhf_reward": (score + non_score).mean().item(),
        "objective/scores": score.mean().item(),
        "entropy": record.entropy.mean().item(),
        "kl_coefficient": coefficient,
    }


def sampling_metrics(record: TokenRecord) -> Metrics:
    """Return the distance of the sampler's log-probs from the trainer's, by TRL's names."""
    difference = record.logprob - record.sampler_logprob
    ratio = difference.exp()
    return {
        "sampling/sampling_logp_difference/mean": difference.abs().mean().item(),
        "sampling/sampling_logp_difference/max": difference.abs().max().item(),
        "sampling/importance_sampling_ratio/min": ratio.min().item(),
        "sampling/importance_sampling_ratio/mean": ratio.mean().item(),
        "sampling/importance_sampling_ratio/max": ratio.max().item(),
    }


def value_metrics(record: TokenRecord, returns: Tensor | None) -> Metrics:
    """Return the share of the returns' variance that the values explain: 1 all, below 0 none."""
    if returns is None or record.value is None:
        return {}
    variance = returns.var(correction=0)
    left = (returns - record.value).var(correction=0)
    explained = torch.where(variance > 0, 1 - left / variance, 0.0)
    return {
        "critic/explained_var": explained.item(),
        "val/mean": record.value.mean().item(),
        "val/returns": returns.mean().item(),
    }
