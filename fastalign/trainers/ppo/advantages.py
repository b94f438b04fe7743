"""From scores and KL to rewards of tokens, and from those to advantages and returns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.losses import grpo_advantage, rloo_advantage, whiten, whitening_scale
from fastalign.ops import gae, kl_penalty
from fastalign.ops.segments import segment_sum
from fastalign.runs.metrics import Metrics
from fastalign.trainers.ppo.config import KLConfig, PPOSettings
from fastalign.trainers.ppo.record import TokenRecord


@dataclass(frozen=True)
class Penalised:
    """A step's KL and what it makes of the scores.

    Attributes:
        kl: (N,) the estimate at each token.
        sequence_kl: (R,) its sums.
        reward: (N,) -coefficient * kl where the KL is in the reward, plus the score at each
            response's last token.
    """

    kl: Tensor
    sequence_kl: Tensor
    reward: Tensor


def penalise(
    record: TokenRecord,
    score: Tensor,  # (R,)
    config: KLConfig,
    coefficient: float,
) -> Penalised:
    """The reward of every token (arXiv 2203.02155, eq. 2), by the chosen estimate of the KL."""
    in_reward = coefficient if config.place == "reward" else 0.0
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


@dataclass(frozen=True)
class Advantages:
    """What the updates go by.

    Attributes:
        advantage: (N,).
        returns: (N,), what values should be; None without a value model.
        scale: what whitening multiplied rewards by on their way into the advantage.
    """

    advantage: Tensor
    returns: Tensor | None
    scale: float


def find_advantages(
    record: TokenRecord, reward: Tensor, settings: PPOSettings, num_samples: int
) -> Advantages:
    """The advantage of every token, and the returns where there is a value model.

    A response that was cut off ends there: what stands behind it is not bootstrapped, as its score
    was given for what there is of it.

    Args:
        record: of the rollouts.
        reward: (N,) of every token.
        settings: which advantage, and what is whitened.
        num_samples: responses of each prompt.
    """
    returns, scale = None, 1.0
    if settings.advantage == "gae":
        assert record.value is not None
        if settings.whitens_rewards:
            scale = whitening_scale(reward).item()
            reward = whiten(reward, shift_mean=False)
        advantage, returns = gae(
            reward,
            record.value,
            record.bounds,
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
        )
    else:
        formula = {"rloo": rloo_advantage, "grpo": grpo_advantage}[settings.advantage]
        of_response = formula(segment_sum(reward, record.bounds), num_samples)
        lengths = record.bounds.diff()
        advantage = of_response.repeat_interleave(lengths, output_size=record.num_tokens)
    if settings.whitens_advantages:
        scale *= whitening_scale(advantage).item()
        advantage = whiten(advantage)
    return Advantages(advantage, returns, scale)


def objective_metrics(
    record: TokenRecord, found: Penalised, score: Tensor, config: KLConfig, coefficient: float
) -> Metrics:
    """TRL's `objective/...`, means over responses; `entropy`, over tokens; `kl_coefficient`."""
    penalty = coefficient if config.place == "reward" else 0.0
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
    """How far the sampler's log-probs are from the trainer's, by TRL's names."""
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
    """How much of the returns' variance the values knew beforehand: 1 all of it, below 0 none."""
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


def adapted_coefficient(
    coefficient: float, kl: float, config: KLConfig, num_responses: int
) -> float:
    """The next step's coefficient (arXiv 1909.08593, section 2.2).

    error = clip(kl / target - 1, -0.2, 0.2); coefficient * (1 + error * responses / horizon).
    """
    if config.target is None:
        return coefficient
    error = min(max(kl / config.target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_responses / config.horizon)
