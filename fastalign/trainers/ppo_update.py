"""PPO's updates: epochs of mini-batches over one step's rollouts, each an optimiser step."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, pvariance
from typing import Any

from fastalign.data import indices_of_step
from fastalign.trainers.accumulate import BatchLoss, Examples, accumulate
from fastalign.trainers.metrics import Metrics, mean_metrics
from fastalign.trainers.ppo_losses import Update, policy_batch_loss, value_batch_loss
from fastalign.trainers.sft import make_sft_loss, num_targets
from fastalign.trainers.state import TrainState
from fastalign.trainers.step import optimiser_step, policy_loss


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
