"""Online DPO's samples: answers of the policy as it is, their scores, their KL, and the pairs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fastalign.batch.packed import Group
from fastalign.compute import Compute
from fastalign.models.reward import RewardScale
from fastalign.runs.inputs import load_for_training
from fastalign.runs.metrics import Metrics
from fastalign.trainers.online_dpo.config import OnlineDPOConfig
from fastalign.trainers.online_dpo.reference import OnlineReference, response_logprobs
from fastalign.trainers.sampling.collapse import repeated_ratio
from fastalign.trainers.sampling.rollout import (
    Rollouts,
    SamplingSetup,
    final_scores,
    load_prompt_sets,
    load_sources,
    open_policy_sampler,
)


@dataclass(frozen=True, kw_only=True)
class OnlineDPOSetup(SamplingSetup):
    """The inputs of every step of a run.

    Attributes:
        model: the policy.
        reference: the model that the policy is held near; None for a loss without one.
    """

    config: OnlineDPOConfig
    model: Any
    reference: OnlineReference | None


@dataclass(frozen=True)
class Scored:
    """Rollouts with what is known of their R responses.

    Attributes:
        rollouts: prompts with their sampled responses.
        scores: (R,) float32, what pairs are ordered by.
        logprob: (R,) float32, under the policy before the updates.
        reference_logprob: (R,) float32, or None without a reference.
        metrics: TRL's `objective/...`, and those of the rollouts; `entropy` is a token's, estimated
            by what was sampled.
    """

    rollouts: Rollouts
    scores: Tensor
    logprob: Tensor
    reference_logprob: Tensor | None
    metrics: Metrics


def prepare_online_dpo(config: OnlineDPOConfig, compute: Compute) -> OnlineDPOSetup:
    """Load the models, the reward sources and the prompts; open the sampler."""
    sources = load_sources(config.reward, compute, config.data)
    model, tokenizer = load_for_training(config, compute)
    reference, limiting = None, [model]
    if config.loss.formula().needs_reference:
        reference = OnlineReference(config, model, tokenizer, compute)
        limiting += [] if reference.other is None else [reference.other]
    prompts, held_out = load_prompt_sets(
        config.data, config.sampling, limiting, tokenizer, sources.columns
    )
    return OnlineDPOSetup(
        config=config,
        compute=compute,
        model=model,
        tokenizer=tokenizer,
        reference=reference,
        sampler=open_policy_sampler(config, model, tokenizer, compute),
        sources=sources,
        prompts=prompts,
        held_out=held_out,
    )


def score_samples(online: OnlineDPOSetup, rollouts: Rollouts, scale: RewardScale | None) -> Scored:
    """Score samples of the policy as it is, and measure its entropy and its KL by them."""
    start = time.perf_counter()
    scores = final_scores(online.config.reward, rollouts.rewards, rollouts.ended, scale)
    logprob = response_logprobs(online.model, rollouts.groups, online.compute)
    mean_score = scores.mean().item()
    responses = [ids for group in rollouts.groups for ids in group.response_ids]
    metrics = rollouts.metrics | {
        "completions/repeated_ratio": repeated_ratio(responses),
        "entropy": -logprob.sum().item() / sum(len(ids) for ids in responses),
        "objective/scores": mean_score,
        "objective/entropy": -logprob.mean().item(),
        "time/prepare_seconds": time.perf_counter() - start,
    }
    if online.reference is None:
        return Scored(rollouts, scores, logprob, None, metrics)
    reference_logprob = online.reference.logprobs(rollouts.groups)
    metrics["time/prepare_seconds"] = time.perf_counter() - start
    kl = (logprob - reference_logprob).mean().item()
    penalty = -online.config.loss.beta * kl
    metrics |= {
        "objective/kl": kl,
        "objective/non_score_reward": penalty,
        "objective/rlhf_reward": mean_score + penalty,
    }
    return Scored(rollouts, scores, logprob, reference_logprob, metrics)


def evaluate_samples(online: OnlineDPOSetup, scale: RewardScale | None) -> Metrics:
    """Return metrics named `eval_...` of one sample of each held-out prompt."""
    scored = score_samples(online, online.roll_out_held_out(), scale)
    metrics = scored.metrics | online.sampler.metrics()
    return {f"eval_{name}": value for name, value in metrics.items()}


@dataclass(frozen=True)
class FreshPairs:
    """B pairs of some rollouts; the first three are parallel.

    Attributes:
        groups: each with two responses, the better one first.
        places: indices of the two among the rollouts' R responses.
        ties: whether the two have the same score.
        num_ties_dropped: prompts of which there is no pair.
    """

    groups: list[Group]
    places: list[tuple[int, int]]
    ties: list[bool]
    num_ties_dropped: int


def choose_pairs(
    groups: Sequence[Group], scores: Tensor, ties: Literal["drop", "use"]
) -> FreshPairs:
    """Choose a pair of each prompt; of equal samples the first is taken.

    Samples of one score have no best. With `use` two of them that differ are a tie; where all are
    the same tokens there is nothing to compare, whatever their scores.

    `scores` (R,) are in the order of the groups' responses.
    """
    chosen: list[tuple[Group, tuple[int, int], bool]] = []
    start = 0
    values = scores.tolist()
    for group in groups:
        samples = [list(ids) for ids in group.response_ids]
        own = values[start : start + len(samples)]
        best, worst = own.index(max(own)), own.index(min(own))
        is_tie = own[best] == own[worst]
        if is_tie:  # the other side is the first that differs, if any does
            worst = next((i for i, ids in enumerate(samples) if ids != samples[best]), best)
        if samples[best] != samples[worst] and not (is_tie and ties == "drop"):
            pair = Group(group.prompt_ids, [samples[best], samples[worst]])
            chosen.append((pair, (start + best, start + worst), is_tie))
        start += len(samples)
    assert start == len(values)
    return FreshPairs(
        groups=[pair for pair, _, _ in chosen],
        places=[places for _, places, _ in chosen],
        ties=[is_tie for _, _, is_tie in chosen],
        num_ties_dropped=len(groups) - len(chosen),
    )
