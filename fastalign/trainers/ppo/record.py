"""Numbers of each sampled token before the updates: log-probs, KL, value, entropy, reward.

N tokens of R responses, in the rollouts' order. All passes run the same packed batch, so a prompt
is computed once for its responses in each of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import nan
from statistics import fmean, pvariance
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.batch.packed import PackedBatch
from fastalign.batch.schedule import packed_batches
from fastalign.compute import Compute, memory_used_in, require_finite
from fastalign.fused.metrics import is_count
from fastalign.losses.policy import MAX_LOG_RATIO, probability_ratio, value_clipped
from fastalign.models.attention.plan import AttentionPlan
from fastalign.models.forward import (
    frozen_hidden_and_head,
    hidden_and_head,
    response_logprob,
)
from fastalign.models.lora import as_reference
from fastalign.models.reward import reward_scale, score_at, score_of
from fastalign.ops import LinearHead, LinearKL, gae, kl_penalty, linear_kl, linear_logprob
from fastalign.ops.kl_penalty.api import MAX_K3
from fastalign.ops.segments import segment_sum
from fastalign.progress import advance, phase
from fastalign.ranks.parallel import enter
from fastalign.ranks.world import World
from fastalign.runs.accumulate import Examples, measure_examples
from fastalign.runs.metrics import Metrics
from fastalign.trainers.ppo.advantages import Advantages, Gae, GroupAdvantage, Unweighted
from fastalign.trainers.ppo.config import KLPenalty, PolicyGradientConfig, PPOConfig
from fastalign.trainers.ppo.setup import PPOModels, PPOSetup, shares_policy
from fastalign.trainers.sampling.collapse import repeated_ratio
from fastalign.trainers.sampling.rollout import Rollouts


@dataclass(frozen=True)
class TokenRecord:
    """Numbers of every sampled token, on the CPU.

    Attributes:
        bounds: (R + 1,) int64, response r owns the tokens [r] to [r + 1] of the N.
        group_bounds: G + 1 bounds of each prompt's responses together.
        logprob: (N,) under the policy before the updates, by the trainer; as `entropy` and `value`
            NaN where the first update is to compute it (`FirstUpdate`).
        reference_logprob: (N,) under the reference.
        sampler_logprob: (N,) under what the token was drawn from.
        entropy: (N,) of the policy.
        full_kl: (N,) KL(policy || reference) over the vocabulary; None where not asked for.
        value: (N,) of the state that the token was drawn in; None without a value model.
    """

    bounds: Tensor
    group_bounds: tuple[int, ...]
    logprob: Tensor
    reference_logprob: Tensor
    sampler_logprob: Tensor
    entropy: Tensor
    full_kl: Tensor | None
    value: Tensor | None

    def rows_of(self, groups: Sequence[int]) -> Tensor:
        """Return the indices of these groups' tokens among the N, in the groups' order."""
        bounds = self.group_bounds
        return torch.cat([torch.arange(bounds[g], bounds[g + 1]) for g in groups])

    def bounds_of(self, groups: Sequence[int]) -> list[int]:
        """Return the bounds of these groups' tokens, laid end to end."""
        bounds = self.group_bounds
        return [0, *accumulate(bounds[group + 1] - bounds[group] for group in groups)]

    def responses_of(self, groups: Sequence[int], num_samples: int) -> tuple[list[int], Tensor]:
        """Return these groups' responses, and the bounds (R + 1,) of their tokens, end to end."""
        responses = [g * num_samples + s for g in groups for s in range(num_samples)]
        lengths = self.bounds.diff()[responses]
        return responses, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


class FirstUpdate:
    """Numbers that the first update computes before it changes a model.

    Args:
        record: the record that they are written into.
    """

    def __init__(self, record: TokenRecord) -> None:
        self._record = record
        self._parts: list[tuple[Tensor, dict[str, Tensor]]] = []

    def keep(self, rows: Tensor, **numbers: Tensor) -> None:
        """Keep numbers (n,) by their names in the record; `rows` are their indices of the N."""
        self._parts.append((rows, {name: each.detach() for name, each in numbers.items()}))

    def finish(self, world: World) -> None:
        """Write all ranks' numbers into the record."""
        mine = [(rows, {name: n.cpu() for name, n in found.items()}) for rows, found in self._parts]
        for of_rank in world.gather(mine):
            for rows, found in of_rank:
                for name, numbers in found.items():
                    require_finite(numbers, f"{name} of the sampled tokens")
                    getattr(self._record, name)[rows] = numbers


@torch.no_grad()
def numbers_of_batch(
    models: PPOModels,
    batch: PackedBatch,
    compute: Compute,
    temperature: float,
    full_kl: bool,
    policy: bool,
) -> dict[str, Tensor]:
    """Compute the numbers of one batch's tokens, each (N,); those of the policy if `policy`."""
    plan = AttentionPlan(batch)  # one for every model

    def of_policy() -> dict[str, Tensor]:
        policy = hidden_and_head(models.policy, batch, compute, plan)
        values = {"value": score_of(models.policy, policy[0])} if models.shares_trunk else {}
        if reference is not None:
            found = both_heads(policy, reference, batch.targets, compute, temperature)._asdict()
            return {**found, **values, "full_kl": found.pop("kl")}
        logprob, entropy = linear_logprob(
            *policy,
            batch.targets,
            return_entropy=True,
            temperature=temperature,
            compute_dtype=compute.product_dtype,
            max_buffer_bytes=compute.max_buffer_bytes,
        )
        return {"logprob": logprob, "entropy": entropy, **values}

    def of_reference() -> Tensor:
        return response_logprob(models.reference, batch, compute, plan, temperature=temperature)

    reference = reference_head(models.reference, batch, compute, plan) if full_kl else None
    found = enter(models.policy, of_policy) if policy else {}
    if not full_kl:
        with as_reference(models.reference):
            found["reference_logprob"] = enter(models.reference, of_reference)
    value = models.value
    if value is not None and not models.shares_trunk:
        found["value"] = enter(value, lambda: token_values(value, batch, compute, plan))
    return found


def record_tokens(
    models: PPOModels,
    rollouts: Rollouts,
    examples: Examples,
    compute: Compute,
    *,
    temperature: float,
    full_kl: bool,
    policy: bool = True,
) -> tuple[TokenRecord, Metrics]:
    """Run the policy, the reference and the value model on the rollouts.

    The policy is the model at the samples' `temperature`; `full_kl` adds the KL over the
    vocabulary. Without `policy` its log-probs and entropies are NaN.

    Returns:
        The record, and `num_micro_batches` and `num_packed_tokens`.
    """
    parts = {}
    counts = {"num_micro_batches": 0, "num_packed_tokens": 0}
    everything = range(len(examples.groups))
    with phase("log-probs and values", len(everything), "prompts"):
        for piece in packed_batches(examples.groups, everything, examples.lengths, compute):
            num_tokens = piece.batch.num_tokens
            with memory_used_in(f"log-probs and values of a batch of {num_tokens} tokens"):
                batch = piece.batch.to(compute.device)
                found = numbers_of_batch(models, batch, compute, temperature, full_kl, policy)
            if piece.counts:
                parts[tuple(piece.indices)] = {name: each.cpu() for name, each in found.items()}
                counts["num_micro_batches"] += 1
                counts["num_packed_tokens"] += num_tokens
                advance(len(piece.indices) * compute.world.size)
    ranks = compute.world.gather((parts, counts))
    joined = joined_parts(examples, {k: v for of_rank, _ in ranks for k, v in of_rank.items()})
    for name in {"logprob", "reference_logprob", "value"} & joined.keys():
        require_finite(joined[name], f"{name} of the sampled tokens")
    lengths = [len(ids) for group in examples.groups for ids in group.response_ids]
    if not policy:
        joined |= {name: torch.full((sum(lengths),), nan) for name in ("logprob", "entropy")}
    record = TokenRecord(
        bounds=torch.tensor([0, *accumulate(lengths)]),
        group_bounds=(0, *accumulate(num_response_tokens(examples))),
        sampler_logprob=torch.tensor(
            [p for answers in rollouts.completions for a in answers for p in a.logprobs]
        ),
        logprob=joined["logprob"],
        reference_logprob=joined["reference_logprob"],
        entropy=joined["entropy"],
        full_kl=joined.get("full_kl"),
        value=joined.get("value"),
    )
    return record, {name: sum(of_rank[name] for _, of_rank in ranks) for name in counts}


def num_response_tokens(examples: Examples) -> list[int]:
    """Return the number of response tokens of each group."""
    return [sum(len(ids) for ids in group.response_ids) for group in examples.groups]


def joined_parts(
    examples: Examples, parts: Mapping[tuple[int, ...], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Join the batches' numbers into one (N,) of all tokens, by the groups of each batch."""
    sizes = num_response_tokens(examples)
    places: dict[str, list[Tensor]] = {}
    for chosen, found in parts.items():
        for name, values in found.items():
            of_name = places.setdefault(name, [torch.empty(0)] * len(sizes))
            split = torch.split(values, [sizes[g] for g in chosen])
            for group, part in zip(chosen, split, strict=True):
                of_name[group] = part
    return {name: torch.cat(each) for name, each in places.items()}


def token_values(
    value: Any, batch: PackedBatch, compute: Compute, plan: AttentionPlan | None
) -> Tensor:
    """Return the value (N,) of the state that each token was drawn in.

    On the scale of the rewards: a reward model's scores are normalised by its `reward_mean` and
    `reward_std`, and so are the values that begin as its scores.
    """
    raw = score_at(value, batch, batch.predict_index, compute, plan)
    return reward_scale(value).normalise(raw)


def reference_head(
    reference: object, batch: PackedBatch, compute: Compute, plan: AttentionPlan | None
) -> tuple[Tensor, LinearHead]:
    """Return `frozen_hidden_and_head` of the reference."""
    with as_reference(reference):
        return frozen_hidden_and_head(reference, batch, compute, plan)


def both_heads(
    policy: tuple[Tensor, LinearHead],
    reference: tuple[Tensor, LinearHead],
    targets: Tensor,
    compute: Compute,
    temperature: float,
) -> LinearKL:
    """Return log-probs, entropy and the KL over the vocabulary, each (N,), in one pass."""
    return linear_kl(
        *policy,
        *reference,
        targets,
        temperature=temperature,
        compute_dtype=compute.product_dtype,
        max_buffer_bytes=compute.max_buffer_bytes,
    )


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
    reward = -in_reward * record.full_kl + rewards_without_kl(record, score)
    return Penalised(record.full_kl, segment_sum(record.full_kl, record.bounds), reward)


def rewards_without_kl(record: TokenRecord, score: Tensor) -> Tensor:
    """Return the reward of every token (N,): the score (R,) at each response's last, else 0."""
    reward = torch.zeros(int(record.bounds[-1]), dtype=score.dtype)
    reward[record.bounds[1:] - 1] = score
    return reward


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
    """Return TRL's `objective/...` (means over responses), and `entropy` (over tokens).

    `objective/num_clamped` counts the tokens whose KL is the largest that `kl_penalty` gives.
    """
    penalty = coefficient if config.in_reward else 0.0
    non_score = -penalty * found.sequence_kl
    clamped = (config.estimator == "k3") & (found.kl >= MAX_K3)
    return {
        "objective/kl": found.sequence_kl.mean().item(),
        "objective/entropy": -segment_sum(record.logprob, record.bounds).mean().item(),
        "objective/non_score_reward": non_score.mean().item(),
        "objective/rlhf_reward": (score + non_score).mean().item(),
        "objective/scores": score.mean().item(),
        "entropy": record.entropy.mean().item(),
        "kl_coefficient": coefficient,
        "objective/num_clamped": clamped.sum().item(),
    }


def sampling_metrics(record: TokenRecord) -> Metrics:
    """Return the distance of the sampler's log-probs from the trainer's, by TRL's names.

    `sampling/num_clamped` counts the tokens whose ratio `probability_ratio` bounds.
    """
    difference = record.logprob - record.sampler_logprob
    ratio = probability_ratio(record.logprob, record.sampler_logprob)
    return {
        "sampling/sampling_logp_difference/mean": difference.abs().mean().item(),
        "sampling/sampling_logp_difference/max": difference.abs().max().item(),
        "sampling/importance_sampling_ratio/min": ratio.min().item(),
        "sampling/importance_sampling_ratio/mean": ratio.mean().item(),
        "sampling/importance_sampling_ratio/max": ratio.max().item(),
        "sampling/num_clamped": (difference.abs() > MAX_LOG_RATIO).sum().item(),
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


@dataclass(frozen=True)
class Experience:
    """One step's rollouts as all its updates see them.

    Attributes:
        examples: prompts with their responses.
        record: numbers of every sampled token, before the updates.
        score: (R,) of each response.
        advantages: advantage of every token, and the returns of a value model.
        kl_coefficient: weight of the KL in this step.
        weight: (N,) weight of each token's policy loss that corrects the sampler's drift, or None.
        reward: (N,) of each token, without a KL where the first update computes the log-probs.
        first: log-probs that the first update is to compute for the record, or None.
        first_value: values that it is to compute, or None.
    """

    examples: Examples
    record: TokenRecord
    score: Tensor
    advantages: Advantages
    kl_coefficient: float
    weight: Tensor | None
    reward: Tensor
    first: FirstUpdate | None = None
    first_value: FirstUpdate | None = None


class Wait(NamedTuple):
    """Numbers that the first update computes, before it changes a model."""

    logprob: bool = False
    value: bool = False


NOTHING_WAITS = Wait()


def first_update_can_compute(config: PolicyGradientConfig) -> Wait:
    """Return what nothing needs before an update of all tokens, whose own forwards compute it.

    A KL in the reward needs the policy's log-probs for the advantages: earlier, unless these
    compare each prompt's responses alone, which the loss of a group sees together. The values'
    loss needs a response's own returns, and the policy's loss follows it. Where both read the same
    hidden states, one forward before the updates gives all numbers.
    """
    kl, settings = config.kl, config.ppo
    if shares_policy(config):
        return NOTHING_WAITS
    estimator, one = settings.advantage, settings.mini_batches == 1
    by_group = isinstance(estimator, GroupAdvantage) and estimator.whiten == "none"
    needed = kl.in_reward and kl.coefficient > 0 and not by_group
    needed |= kl.estimator == "full" or not isinstance(settings.importance, Unweighted)
    # The scale of whitened advantages would be known too late for an exact KL in the loss.
    by_response = isinstance(estimator, Gae) and estimator.whiten in ("advantages", "none")
    return Wait(one and not needed, one and by_response and kl.estimator != "full")


def make_experience(
    ppo: PPOSetup, rollouts: Rollouts, score: Tensor, coefficient: float, wait: Wait = NOTHING_WAITS
) -> tuple[Experience, Metrics]:
    """Compute log-probs, values, rewards and advantages of the rollouts, before any update.

    `score` (R,) is of each response. What waits is NaN until the first update has computed it; a KL
    in the reward enters the advantages there, if the log-probs wait.

    Returns:
        The experience, and `num_packed_tokens` and `num_micro_batches`.
    """
    config = ppo.config
    examples = measure_examples(rollouts.groups, ppo.compute.packing)
    record, counts = record_tokens(
        replace(ppo.models, value=None) if wait.value else ppo.models,
        rollouts,
        examples,
        ppo.compute,
        temperature=config.sampling.temperature,
        full_kl=config.kl.estimator == "full",
        policy=not wait.logprob,
    )
    if wait.value:
        record = replace(record, value=torch.full_like(record.reference_logprob, nan))
    if wait.logprob:
        reward = rewards_without_kl(record, score)
    else:
        reward = penalise(record, score, config.kl, coefficient).reward
    advantages = config.ppo.advantage.estimate(
        reward, record.value, record.bounds, config.sampling.num_samples
    )
    sampled = (record.logprob, record.sampler_logprob, record.bounds)
    weight = config.ppo.importance.weight(*sampled)
    first, first_value = (FirstUpdate(record) if each else None for each in wait)
    experience = Experience(
        examples, record, score, advantages, coefficient, weight, reward, first, first_value
    )
    return experience, counts


def measure_experience(ppo: PPOSetup, experience: Experience) -> Metrics:
    """Return metrics of the experience, once its record is whole."""
    record, kl, coefficient = experience.record, ppo.config.kl, experience.kl_coefficient
    score = experience.score
    penalised = penalise(record, score, kl, coefficient)
    responses = [ids for group in experience.examples.groups for ids in group.response_ids]
    weight = experience.weight
    masked = {} if weight is None else {"sampling/num_masked": int((weight == 0).sum())}
    return {
        **masked,
        **objective_metrics(record, penalised, score, kl, coefficient),
        **sampling_metrics(record),
        **value_metrics(record, experience.advantages.returns),
        "completions/repeated_ratio": repeated_ratio(responses),
    }


def mean_of_updates(updates: Sequence[Metrics]) -> Metrics:
    """Average over updates; sum counts and `skipped`; `val/ratio_var` is over the updates."""
    result: Metrics = {"num_updates": len(updates)}
    for name in updates[0]:
        values: list[Any] = [metrics[name] for metrics in updates]
        summed = name == "skipped" or is_count(name)
        result[name] = sum(values) if summed else fmean(values)
    result["val/ratio_var"] = pvariance([metrics["val/ratio"] for metrics in updates])
    return result


def value_batch_loss(
    ppo: PPOSetup, experience: Experience, num_tokens: int, batch: PackedBatch, chosen: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the clipped value loss times its coefficient, and sums for the metrics."""
    value = token_values(ppo.models.value, batch, ppo.compute, None)
    return value_loss(ppo, experience, num_tokens, value, chosen)


def value_loss(
    ppo: PPOSetup, experience: Experience, num_tokens: int, value: Tensor, chosen: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute `value_batch_loss` from the values (n,) of the chosen groups' tokens."""
    assert isinstance(ppo.config, PPOConfig)
    settings, record, first = ppo.config.value, experience.record, experience.first_value
    rows = record.rows_of(chosen)

    def moved(values: Tensor | None) -> Tensor:
        assert values is not None
        return values[rows].to(value, non_blocking=True)

    if first is None:
        before, target = moved(record.value), moved(experience.advantages.returns)
    else:
        before = value.detach()
        first.keep(rows, value=before)
        target = returns_of(ppo, experience, moved(experience.reward), before, chosen)
    losses = value_clipped(value, before, target, clip_range=settings.clip_range)
    clipped = losses.detach() > (value.detach() - target).square() / 2
    return settings.coefficient * losses.sum() / num_tokens, {
        "val/clipfrac_avg": clipped.float().sum(),
        "num_target_tokens": torch.tensor(len(rows)),
    }


def returns_of(
    ppo: PPOSetup, experience: Experience, reward: Tensor, value: Tensor, groups: Sequence[int]
) -> Tensor:
    """Return the returns (n,) of these groups' tokens, from their rewards and values (n,)."""
    estimator = ppo.config.ppo.advantage
    assert isinstance(estimator, Gae)
    _, bounds = experience.record.responses_of(groups, ppo.config.sampling.num_samples)
    bounds = bounds.to(value.device)
    _, returns = gae(reward, value, bounds, gamma=estimator.gamma, gae_lambda=estimator.gae_lambda)
    return returns
