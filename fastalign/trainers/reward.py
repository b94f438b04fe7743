"""Reward models: comparisons to a score of responses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.batch import PackedBatch
from fastalign.data import (
    TokenizedDataset,
    Tokenizer,
    eos_token_ids,
    use_distinct_pad,
)
from fastalign.models import response_reward, save_reward_model, set_pad_token
from fastalign.trainers.config import RewardConfig
from fastalign.trainers.evaluate import evaluate_by_loss
from fastalign.trainers.loop import RunResult, Task, run_loop
from fastalign.trainers.metrics import Metrics, mean_metrics
from fastalign.trainers.reward_losses import RewardLoss, TieLoss
from fastalign.trainers.setup import load_reward_for_training, load_sets, opened_run
from fastalign.trainers.step import (
    BatchLoss,
    Compute,
    Examples,
    accumulate,
    make_compute,
    measure_examples,
    supervised,
)

# The name of the learned tie parameter on the model; the saved model's config holds its nu.
LOG_NU = "log_nu"


@dataclass(frozen=True)
class Comparisons:
    """Pairs ready to be trained on.

    Attributes:
        examples: groups of two responses, chosen first.
        ties: (number of pairs,) bool.
        margins: (number of pairs,) float32; 0 where the row has none.
    """

    examples: Examples
    ties: Tensor
    margins: Tensor


def train_reward(config: RewardConfig) -> RunResult:
    """Trains a reward model to the run's end, or until it is stopped.

    Raises:
        ValueError: in one line, whatever of the caller's is wrong.
        FileNotFoundError: a file that is not there.
    """
    compute = make_compute(config.train)
    with opened_run(config):
        model, tokenizer = load_reward_for_training(config, compute)
        data, held_out = load_sets(config, model, tokenizer)
        pairs = prepare(config.loss, data, compute)
        ends = {ids[-1] for group in data.groups for ids in group.response_ids}
        stops = eos_token_ids(tokenizer, config.model.path)
        set_pad_token(model, use_distinct_pad(tokenizer, ends.union(stops)))
        add_nu(model, config)
        evaluate = None
        if held_out is not None:
            evaluate = make_evaluate(model, config, held_out, compute)
        return run_loop(
            config,
            model,
            Task(
                title="reward",
                num_examples=len(data.groups),
                data_fingerprint=data.fingerprint,
                tokenizer=tokenizer,
                take_step=supervised(
                    lambda indices: reward_step(model, config.loss, pairs, indices, compute),
                    config.optim,
                ),
                evaluate=evaluate,
                save_model=partial(save_with_nu, loss=config.loss),
            ),
        )


def prepare(loss: RewardLoss, data: TokenizedDataset, compute: Compute) -> Comparisons:
    """Measures the pairs; says where rows have margins that the loss has no place for."""
    num_margins = sum(margin is not None for margin in data.margins)
    if num_margins and not loss.uses_margins:
        print(f"margins of {num_margins} rows are not used by this loss", flush=True)
    return Comparisons(
        measure_examples(data.groups, compute.packing),
        torch.tensor(data.ties),
        torch.tensor([margin or 0.0 for margin in data.margins]),
    )


def make_evaluate(
    model: Any, config: RewardConfig, data: TokenizedDataset, compute: Compute
) -> Callable[[], Metrics]:
    """The held-out pairs' metrics as a function of the model as it stands."""
    pairs = prepare(config.loss, data, compute)
    batch_loss = make_reward_loss(model, config.loss, pairs, len(data.groups), compute)
    return lambda: evaluate_by_loss(pairs.examples, batch_loss, compute)


def add_nu(model: Any, config: RewardConfig) -> None:
    """Gives the model the parameter that the loss learns, so that checkpoints hold it.

    Raises:
        ValueError: the weights' learning rate is 0, so there is no schedule to follow.
    """
    loss = config.loss
    if not isinstance(loss, TieLoss) or not loss.nu_lr:
        return
    if not config.optim.lr:
        raise ValueError(f"optim.lr: expected more than 0 where loss.nu_lr is {loss.nu_lr}, got 0")
    parameter = nn.Parameter(torch.tensor(loss.log_nu, device=model.device))
    parameter.lr_scale = loss.nu_lr / config.optim.lr  # type: ignore[attr-defined]
    model.register_parameter(LOG_NU, parameter)


def learned_nu(model: Any, loss: RewardLoss) -> Tensor | None:
    """Nu () as it stands, or None where it is not learned."""
    log_nu = getattr(model, LOG_NU, None)
    return None if log_nu is None or not isinstance(loss, TieLoss) else loss.nu_of(log_nu)


def save_with_nu(model: Any, tokenizer: Tokenizer, folder: Any, *, loss: RewardLoss) -> None:
    """Writes the reward model; its configuration says how likely ties are (`tie_nu`)."""
    nu = learned_nu(model, loss)
    if isinstance(loss, TieLoss):
        model.config.tie_model = type(loss).function.__name__
        model.config.tie_nu = loss.nu if nu is None else nu.item()
    save_reward_model(model, tokenizer, folder, leave_out=(LOG_NU,))


def make_reward_loss(
    model: Any, loss: RewardLoss, pairs: Comparisons, normaliser: int, compute: Compute
) -> BatchLoss:
    """The loss of each micro-batch; the two responses of a pair stay together."""

    def batch_loss(batch: PackedBatch, chosen: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        with compute.autocast():
            reward = response_reward(model, batch, packing=compute.packing)
        tie = pairs.ties[chosen].to(reward.device)
        margin = pairs.margins[chosen].to(reward.device)
        nu = learned_nu(model, loss)
        each = loss.of_pairs(reward[0::2], reward[1::2], tie, margin, nu)
        return each.sum() / normaliser, reward_sums(reward.detach(), tie)

    return batch_loss


def reward_sums(reward: Tensor, tie: Tensor) -> dict[str, Tensor]:
    """TRL's metrics, summed over pairs; accuracy and margin are of those that are no ties."""
    difference = (reward[0::2] - reward[1::2])[~tie]
    return {
        "accuracy": (difference > 0).sum(),
        "margin": difference.sum(),
        "min_reward": reward.min(),
        "mean_reward": reward.sum() / 2,
        "max_reward": reward.max(),
        "num_pairs": torch.tensor(tie.numel()),
        "num_ties": tie.sum(),
    }


def reward_step(
    model: Any, loss: RewardLoss, pairs: Comparisons, indices: Sequence[int], compute: Compute
) -> tuple[Metrics, int]:
    """Adds one step's gradient; returns its metrics and the packed tokens computed."""
    batch_loss = make_reward_loss(model, loss, pairs, len(indices), compute)
    value, sums, num_tokens = accumulate(
        pairs.examples, indices, batch_loss, compute, backward=True
    )
    nu = learned_nu(model, loss)
    learned = {} if nu is None else {"nu": nu.item()}
    return {"loss": value, **mean_metrics(sums), **learned}, num_tokens
