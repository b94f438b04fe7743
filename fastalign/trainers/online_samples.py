"""What online DPO samples: answers of the policy as it stands, their scores, their KL."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastalign.data import PromptDataset, Tokenizer
from fastalign.rollouts import Sampler, SamplingParams
from fastalign.trainers.metrics import Metrics
from fastalign.trainers.online_config import OnlineDPOConfig
from fastalign.trainers.online_reference import OnlineReference, response_logprobs
from fastalign.trainers.reward_sources import RewardSources, ScoreScale, final_scores
from fastalign.trainers.rollout import (
    PolicySampler,
    Rollouts,
    roll_out,
    rollout_seed,
    scale_of_policy,
)
from fastalign.trainers.step import Compute


@dataclass(frozen=True)
class Online:
    """What a step uses; `reference` is None for a loss without."""

    config: OnlineDPOConfig
    model: Any
    tokenizer: Tokenizer
    compute: Compute
    prompts: PromptDataset
    sampler: Sampler
    sources: RewardSources
    scale: ScoreScale | None
    reference: OnlineReference | None


@dataclass(frozen=True)
class Scored:
    """Rollouts with what is known of their R responses.

    Attributes:
        rollouts: of some prompts.
        scores: (R,) float32, what pairs are ordered by.
        reference_logprob: (R,) float32, or None without a reference.
        metrics: TRL's `objective/...`, and those of the rollouts.
    """

    rollouts: Rollouts
    scores: Tensor
    reference_logprob: Tensor | None
    metrics: Metrics


def prepare(
    config: OnlineDPOConfig,
    model: Any,
    tokenizer: Tokenizer,
    prompts: PromptDataset,
    sources: RewardSources,
    compute: Compute,
) -> Online:
    """The sampler, the reference and the scale of scores, from a policy before its first step."""
    sampler = PolicySampler(model, tokenizer, config.model.path, compute)
    reference, scale = None, None
    if config.loss.formula().needs_reference:
        reference = OnlineReference(config, model, tokenizer, compute)
    if config.reward.normalise:
        scale = scale_of_policy(
            sampler, prompts, config.sampling, tokenizer, sources, run_seed=config.run.seed
        )
    return Online(config, model, tokenizer, compute, prompts, sampler, sources, scale, reference)


def score_samples(
    online: Online,
    prompts: PromptDataset,
    indices: Sequence[int],
    params: SamplingParams,
    seed: int,
) -> Scored:
    """Samples the policy as it stands, and scores what it says."""
    rollouts = roll_out(
        online.sampler, prompts, indices, params, online.tokenizer, online.sources, seed=seed
    )
    scores = final_scores(online.config.reward, rollouts.rewards, rollouts.ended, online.scale)
    logprob = response_logprobs(online.model, rollouts.groups, online.compute)
    mean_score = scores.mean().item()
    metrics = rollouts.metrics | {
        "objective/scores": mean_score,
        "objective/entropy": -logprob.mean().item(),
    }
    if online.reference is None:
        return Scored(rollouts, scores, None, metrics)
    reference_logprob = online.reference.logprobs(rollouts.groups)
    kl = (logprob - reference_logprob).mean().item()
    penalty = -online.config.loss.beta * kl
    metrics |= {
        "objective/kl": kl,
        "objective/non_score_reward": penalty,
        "objective/rlhf_reward": mean_score + penalty,
    }
    return Scored(rollouts, scores, reference_logprob, metrics)


def evaluate_samples(online: Online, held_out: PromptDataset) -> Metrics:
    """Metrics named `eval_...` of one sample of each held-out prompt: the same noise every time."""
    single = replace(online.config.sampling, num_samples=1)
    seed = rollout_seed(online.config.run.seed, "eval", 0)
    scored = score_samples(online, held_out, range(len(held_out.prompts)), single, seed)
    return {f"eval_{name}": value for name, value in scored.metrics.items()}
