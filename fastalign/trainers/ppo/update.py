"""PPO's updates: the losses of policy, value model and demonstrations, and one optimiser step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, pvariance
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import PackedBatch
from fastalign.batch.schedule import indices_of_step
from fastalign.fused.metrics import is_count
from fastalign.losses import value_clipped
from fastalign.losses.chunk_losses import ppo_loss_fn
from fastalign.models import AttentionPlan, hidden_and_head
from fastalign.ops import TokenChunk
from fastalign.ops.head.fused_linear_loss import LossFunction
from fastalign.runs.accumulate import Examples, Total, accumulate, policy_loss
from fastalign.runs.metrics import Metrics
from fastalign.runs.state import TrainState, optimiser_step
from fastalign.trainers.ppo.advantages import Advantages
from fastalign.trainers.ppo.record import (
    TokenRecord,
    both_heads,
    exact_kl_coefficient,
    reference_head,
    token_values,
)
from fastalign.trainers.ppo.setup import PPOSetup
from fastalign.trainers.sft import num_targets, sft_batch_loss


@dataclass(frozen=True)
class Experience:
    """One step's rollouts as all its updates see them.

    Attributes:
        examples: prompts with their responses.
        record: numbers of every sampled token, before the updates.
        advantages: advantage of every token, and the returns of a value model.
        kl_coefficient: weight of the KL in this step.
        weight: (N,) weight of each token's policy loss that corrects the sampler's drift, or None.
    """

    examples: Examples
    record: TokenRecord
    advantages: Advantages
    kl_coefficient: float
    weight: Tensor | None


def one_update(
    ppo: PPOSetup,
    experience: Experience,
    state: TrainState,
    groups: Sequence[int],
    number: int,
    num_steps: int,
) -> Metrics:
    """Take one optimiser step on these groups.

    `number` is the update's number within the run, by which demonstrations are drawn.
    """
    terms = update_gradient(ppo, experience, groups, number)
    totals = [total for _, total in terms.values()]
    update = optimiser_step(state, totals, ppo.config.optim, num_steps)
    metrics: Metrics = {"loss": 0.0, "num_packed_tokens": 0, "num_micro_batches": 0}
    for name, (coefficient, total) in terms.items():
        metrics["loss"] += total.loss
        metrics["num_packed_tokens"] += total.num_tokens
        metrics["num_micro_batches"] += int(total.sums.pop("num_micro_batches"))
        metrics[f"loss/{name}_avg"] = total.loss / coefficient
        means = total.metrics()
        metrics |= {k: v for k, v in means.items() if k.startswith(("policy/", "val/"))}
    return metrics | update


def update_gradient(
    ppo: PPOSetup, experience: Experience, groups: Sequence[int], number: int
) -> dict[str, tuple[float, Total]]:
    """Add the gradient of each term of one update's loss: policy, value, demonstrations.

    Returns:
        By the term's name its coefficient and its sums, which hold the coefficient.
    """
    config, models, compute, examples = ppo.config, ppo.models, ppo.compute, experience.examples
    bounds = experience.record.group_bounds
    num_tokens = sum(bounds[group + 1] - bounds[group] for group in groups)
    of_policy = partial(policy_batch_loss, ppo, experience, num_tokens)
    total = accumulate(models.policy, of_policy, examples, groups, compute, last=ppo.ptx is None)
    terms = {"policy": (1.0, total)}
    if models.value is not None:
        of_value = partial(value_batch_loss, ppo, experience, num_tokens)
        total = accumulate(models.value, of_value, examples, groups, compute)
        terms["value"] = config.value.coefficient, total
    if ppo.ptx is not None:
        coefficient, chosen = config.ppo.ptx_coefficient, demonstrations_of(ppo, number)
        normaliser = num_targets(ppo.ptx, chosen) / coefficient
        of_ptx = partial(sft_batch_loss, models.policy, normaliser, compute)
        terms["ptx"] = coefficient, accumulate(models.policy, of_ptx, ppo.ptx, chosen, compute)
    return terms


def demonstrations_of(ppo: PPOSetup, number: int) -> list[int]:
    """Return the demonstrations that one update learns."""
    assert ppo.ptx is not None
    size = max(1, ppo.config.train.batch_size // ppo.config.ppo.mini_batches)
    return indices_of_step(len(ppo.ptx.groups), size, number, seed=ppo.config.run.seed)


def policy_batch_loss(
    ppo: PPOSetup, experience: Experience, num_tokens: int, batch: PackedBatch, chosen: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the policy's loss of a micro-batch over `num_tokens`, and sums for the metrics."""
    loss_fn = clipped_loss(ppo, experience, num_tokens, batch, chosen)
    scale = experience.advantages.scale
    exact = exact_kl_coefficient(ppo.config.kl, experience.kl_coefficient, scale)
    if exact:
        loss, sums, kl = full_kl_loss(ppo, batch, loss_fn)
        return loss + exact * kl / num_tokens, sums | {"policy/kl_avg": kl.detach()}
    temperature = ppo.config.sampling.temperature
    found = policy_loss(ppo.models.policy, batch, loss_fn, ppo.compute, temperature=temperature)
    return found.loss, found.sums


def clipped_loss(
    ppo: PPOSetup, experience: Experience, num_tokens: int, batch: PackedBatch, chosen: list[int]
) -> LossFunction:
    """Return PPO's clipped loss less an entropy bonus, plus a sampled KL if that is in the loss."""
    settings, kl, record = ppo.config.ppo, ppo.config.kl, experience.record
    rows, device = record.rows_of(chosen), batch.targets.device
    sampled = not kl.in_reward and kl.estimator != "full"
    weight = experience.weight

    def moved(values: Tensor) -> Tensor:
        return values[rows].to(device, non_blocking=True)

    return ppo_loss_fn(
        moved(record.logprob),
        moved(experience.advantages.advantage),
        clip_range=settings.clip_range,
        entropy_coefficient=settings.entropy_coefficient,
        weight=None if weight is None else moved(weight),
        reference_logprob=moved(record.reference_logprob) if sampled else None,
        kl_coefficient=experience.kl_coefficient,
        estimator="k3" if kl.estimator == "full" else kl.estimator,
        normaliser=num_tokens,
    )


def full_kl_loss(
    ppo: PPOSetup, batch: PackedBatch, loss_fn: LossFunction
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Compute the loss, sums for its metrics, and the summed exact KL () over the vocabulary.

    The reference runs on the batch, too; one pass reads both heads.
    """
    models, compute = ppo.models, ppo.compute
    plan = AttentionPlan(batch)
    reference = reference_head(models.reference, batch, compute, plan)
    policy = hidden_and_head(models.policy, batch, compute, plan)
    temperature = ppo.config.sampling.temperature
    found = both_heads(policy, reference, batch.targets, compute, temperature)
    of_all = torch.ones_like(batch.targets, dtype=torch.bool)
    ends = (0, batch.num_targets, 0, batch.num_targets)
    chunk = TokenChunk(found.logprob, found.entropy, ~of_all, of_all, *ends)
    loss, sums = loss_fn(chunk)
    sums = {name: value.detach() for name, value in sums.items()}
    del sums["mean_token_accuracy"]  # this pass does not compare logits
    return loss, sums, found.kl.sum()


def value_batch_loss(
    ppo: PPOSetup, experience: Experience, num_tokens: int, batch: PackedBatch, chosen: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the clipped value loss times its coefficient, and sums for the metrics."""
    settings, old, returns = (
        ppo.config.value,
        experience.record.value,
        experience.advantages.returns,
    )
    assert old is not None
    assert returns is not None
    rows = experience.record.rows_of(chosen)
    value = token_values(ppo.models.value, batch, ppo.compute, None)
    before, target = (each[rows].to(value, non_blocking=True) for each in (old, returns))
    losses = value_clipped(value, before, target, clip_range=settings.clip_range)
    clipped = losses.detach() > (value.detach() - target).square() / 2
    return settings.coefficient * losses.sum() / num_tokens, {
        "val/clipfrac_avg": clipped.float().sum(),
        "num_target_tokens": torch.tensor(len(rows)),
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
