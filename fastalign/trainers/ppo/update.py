"""PPO's updates: epochs of mini-batches over one step's rollouts, each an optimiser step."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, pvariance
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import PackedBatch
from fastalign.batch.schedule import indices_of_step
from fastalign.compute import Compute
from fastalign.losses import importance_weight, value_clipped
from fastalign.losses.chunk_losses import ppo_loss_fn
from fastalign.ops import TokenChunk
from fastalign.ops.head.fused_linear_loss import LossFunction
from fastalign.runs.accumulate import BatchLoss, Examples, accumulate
from fastalign.runs.metrics import Metrics, mean_metrics
from fastalign.runs.state import TrainState
from fastalign.runs.step import MakeLoss, optimiser_step, policy_loss
from fastalign.trainers.ppo.config import KLConfig, PPOConfig
from fastalign.trainers.ppo.models import (
    PPOModels,
    both_heads,
    hidden_and_head,
    reference_head,
    shared_plan,
    token_values,
)
from fastalign.trainers.ppo.record import TokenRecord
from fastalign.trainers.sft import make_sft_loss, num_targets


@dataclass(frozen=True)
class Update:
    """What all updates of a step share.

    Attributes:
        config: of the run.
        compute: how forwards are run.
        models: of the run.
        examples: the rollouts' groups.
        record: their tokens, before the updates.
        advantage: (N,).
        returns: (N,), what values should be; None without a value model.
        kl_coefficient: of this step.
        exact_kl_coefficient: of the exact KL in the loss (`find_exact_kl_coefficient`); 0: none.
        ptx: demonstrations, or None.
    """

    config: PPOConfig
    compute: Compute
    models: PPOModels
    examples: Examples
    record: TokenRecord
    advantage: Tensor
    returns: Tensor | None
    kl_coefficient: float
    exact_kl_coefficient: float
    ptx: Examples | None

    @property
    def weight(self) -> Tensor | None:
        """Of each token's policy loss (N,), where the sampler's drift is to be corrected."""
        most = self.config.ppo.max_importance_weight
        if most is None:
            return None
        return importance_weight(self.record.logprob, self.record.sampler_logprob, max_weight=most)


def mini_batches(num_groups: int, count: int, seed: int, step: int, epoch: int) -> list[list[int]]:
    """One epoch's groups in a random order, cut into equal parts: a pure function."""
    order = list(range(num_groups))
    random.Random(f"{seed}/updates/{step}/{epoch}").shuffle(order)
    cuts = [num_groups * part // count for part in range(count + 1)]
    return [order[first:last] for first, last in pairwise(cuts)]


@dataclass(frozen=True)
class LossPart:
    """One term of an update's loss.

    Attributes:
        name: in the metrics, `loss/{name}_avg`.
        coefficient: that `batch_loss` holds already; what is logged is without it.
        examples: what it is computed on.
        indices: which of them.
        batch_loss: of a micro-batch.
        last: whether no other term adds to the same model's gradient after it.
    """

    name: str
    coefficient: float
    examples: Examples
    indices: Sequence[int]
    batch_loss: BatchLoss
    last: bool = True


def loss_parts(update: Update, groups: Sequence[int], number: int) -> Iterator[LossPart]:
    """The terms of one update's loss: policy, value, PTX."""
    config, models = update.config, update.models
    bounds = update.record.group_bounds
    normaliser = sum(bounds[group + 1] - bounds[group] for group in groups)
    of_policy = policy_batch_loss(update, normaliser)
    yield LossPart("policy", 1.0, update.examples, groups, of_policy, last=update.ptx is None)
    if models.value is not None:
        of_value = value_batch_loss(update, normaliser)
        yield LossPart("value", config.value.coefficient, update.examples, groups, of_value)
    if update.ptx is not None:
        coefficient = config.ppo.ptx_coefficient
        size = max(1, config.train.batch_size // config.ppo.mini_batches)
        chosen = indices_of_step(len(update.ptx.groups), size, number, seed=config.run.seed)
        make_loss = make_sft_loss(num_targets(update.ptx, chosen) / coefficient)
        of_ptx = policy_loss(models.policy, make_loss, update.compute)
        yield LossPart("ptx", coefficient, update.ptx, chosen, of_ptx)


def one_update(
    update: Update, state: TrainState, groups: Sequence[int], number: int, num_steps: int
) -> Metrics:
    """One optimiser step on these groups; `number` is the update's within the run."""
    metrics: Metrics = {"loss": 0.0, "num_packed_tokens": 0, "num_micro_batches": 0}
    for part in loss_parts(update, groups, number):
        value, sums, num_tokens = accumulate(
            part.examples,
            part.indices,
            part.batch_loss,
            update.compute,
            backward=True,
            last=part.last,
        )
        metrics["loss"] += value
        metrics["num_packed_tokens"] += num_tokens
        metrics["num_micro_batches"] += int(sums.pop("num_micro_batches"))
        metrics[f"loss/{part.name}_avg"] = value / part.coefficient
        means = mean_metrics(sums)
        metrics |= {k: v for k, v in means.items() if k.startswith(("policy/", "val/"))}
    return metrics | optimiser_step(state, metrics["loss"], update.config.optim, num_steps)


def all_updates(update: Update, state: TrainState, num_steps: int) -> list[Metrics]:
    """Every update of a step, in order."""
    settings, seed = update.config.ppo, update.config.run.seed
    num_groups = len(update.examples.groups)
    number = state.step * settings.epochs * settings.mini_batches
    found: list[Metrics] = []
    for epoch in range(settings.epochs):
        for part in mini_batches(num_groups, settings.mini_batches, seed, state.step, epoch):
            found.append(one_update(update, state, part, number + len(found), num_steps))
    return found


def mean_of_updates(updates: Sequence[Metrics]) -> Metrics:
    """Means over updates; counts and `skipped` are summed; `val/ratio_var` is over the updates."""
    result: Metrics = {"num_updates": len(updates)}
    for name in updates[0]:
        values: list[Any] = [metrics[name] for metrics in updates]
        summed = name == "skipped" or name.startswith("num_")
        result[name] = sum(values) if summed else fmean(values)
    result["val/ratio_var"] = pvariance([metrics["val/ratio"] for metrics in updates])
    return result


def make_ppo_loss(update: Update, normaliser: int) -> MakeLoss:
    """The policy's loss of each micro-batch: clipped, less an entropy bonus, plus a sampled KL."""
    settings, kl, record = update.config.ppo, update.config.kl, update.record
    sampled = kl.place == "loss" and kl.estimator != "full"
    weight = update.weight

    def make_loss(batch: PackedBatch, chosen: list[int]) -> tuple[LossFunction, None]:
        rows = record.rows_of(chosen)
        device = batch.targets.device
        loss_fn = ppo_loss_fn(
            record.logprob[rows].to(device),
            update.advantage[rows].to(device),
            clip_range=settings.clip_range,
            entropy_coefficient=settings.entropy_coefficient,
            weight=None if weight is None else weight[rows].to(device),
            reference_logprob=record.reference_logprob[rows].to(device) if sampled else None,
            kl_coefficient=update.kl_coefficient,
            estimator="k3" if kl.estimator == "full" else kl.estimator,
            normaliser=normaliser,
        )
        return loss_fn, None

    return make_loss


def find_exact_kl_coefficient(config: KLConfig, coefficient: float, scale: float) -> float:
    """The weight of the exact KL in the loss, which it needs where it is in the reward too.

    -KL_t as a reward is the same whatever token is drawn at t: a policy gradient sees what a token
    does to the KL of later states, and misses the derivative of KL_t itself. That derivative, in
    the advantage's scale, makes it the gradient of the whole KL (arXiv 2504.10637). k1 has no need
    of it: its derivative has the mean 0.
    """
    if config.estimator != "full":
        return 0.0
    return coefficient if config.place == "loss" else coefficient * scale


def policy_batch_loss(update: Update, normaliser: int) -> BatchLoss:
    """The policy's loss, fused with its head."""
    make_loss = make_ppo_loss(update, normaliser)
    temperature = update.config.sampling.temperature
    if not update.exact_kl_coefficient:
        return policy_loss(update.models.policy, make_loss, update.compute, temperature=temperature)
    return full_kl_batch_loss(update, make_loss, normaliser)


def full_kl_batch_loss(update: Update, make_loss: MakeLoss, normaliser: int) -> BatchLoss:
    """The same plus the exact KL over the vocabulary, which needs the reference's hidden states."""
    models, compute = update.models, update.compute

    def of_batch(batch: PackedBatch, chosen: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        plan = shared_plan(batch, compute)
        reference = reference_head(models.reference, batch, compute, plan)
        policy = hidden_and_head(models.policy, batch, compute, plan)
        temperature = update.config.sampling.temperature
        found = both_heads(policy, reference, batch.targets, compute, temperature)
        of_all = torch.ones_like(batch.targets, dtype=torch.bool)
        ends = (0, batch.num_targets, 0, batch.num_targets)
        chunk = TokenChunk(found.logprob, found.entropy, ~of_all, of_all, *ends)
        loss, sums = make_loss(batch, chosen)[0](chunk)
        kl = found.kl.sum()
        sums = {name: value.detach() for name, value in sums.items()}
        del sums["mean_token_accuracy"]  # this pass does not compare logits
        sums["policy/kl_avg"] = kl.detach()
        return loss + update.exact_kl_coefficient * kl / normaliser, sums

    return BatchLoss(models.policy, of_batch)


def value_batch_loss(update: Update, normaliser: int) -> BatchLoss:
    """The clipped value loss times its coefficient."""
    settings, record, returns = update.config.value, update.record, update.returns
    old = record.value
    assert old is not None
    assert returns is not None

    def of_batch(batch: PackedBatch, chosen: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = record.rows_of(chosen)
        value = token_values(update.models.value, batch, update.compute, None)
        before, target = old[rows].to(value), returns[rows].to(value)
        losses = value_clipped(value, before, target, clip_range=settings.clip_range)
        clipped = losses.detach() > (value.detach() - target).square() / 2
        return settings.coefficient * losses.sum() / normaliser, {
            "val/clipfrac_avg": clipped.float().sum(),
            "num_target_tokens": torch.tensor(len(rows)),
        }

    return BatchLoss(update.models.value, of_batch)
