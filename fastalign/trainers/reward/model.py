"""The reward model of a run: its pad token, the tie parameter nu, and how it is saved."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.compute import Compute
from fastalign.data import TokenizedDataset, Tokenizer, eos_token_ids, use_distinct_pad
from fastalign.models import save_reward_model, set_pad_token
from fastalign.ranks.whole_weights import whole
from fastalign.runs.load_models import share
from fastalign.runs.metrics import Metrics
from fastalign.trainers.reward.config import RewardConfig, RewardLoss, TieLoss
from fastalign.trainers.reward.evaluation import measure_scale

# Name of the learned tie parameter on the model; the saved model's config holds its nu.
LOG_NU = "log_nu"


def share_reward_model(
    model: Any,
    config: RewardConfig,
    data: TokenizedDataset,
    tokenizer: Tokenizer,
    compute: Compute,
) -> None:
    """Give the model a pad token that ends no response, and nu if it is learned; share it.

    Raises:
        ValueError: if nu is learned and the weights' learning rate is 0.
    """
    ends = {ids[-1] for group in data.groups for ids in group.response_ids}
    stops = eos_token_ids(tokenizer, config.model.path)
    set_pad_token(model, use_distinct_pad(tokenizer, ends.union(stops)))
    add_nu(model, config)
    share(model, compute)


def add_nu(model: Any, config: RewardConfig) -> None:
    """Register the parameter that the loss learns, so that checkpoints hold it.

    Raises:
        ValueError: if the weights' learning rate is 0, so that there is no schedule to follow.
    """
    loss = config.loss
    if not isinstance(loss, TieLoss) or not loss.nu_lr:
        return
    if not config.optim.lr:
        raise ValueError(f"optim.lr: expected more than 0 where loss.nu_lr is {loss.nu_lr}, got 0")
    # One element in a row: FSDP2 shards no scalars.
    parameter = nn.Parameter(torch.tensor([loss.log_nu], device=model.device))
    parameter.lr_scale = loss.nu_lr / config.optim.lr  # type: ignore[attr-defined]
    model.register_parameter(LOG_NU, parameter)


def learned_nu(model: Any, loss: RewardLoss) -> Tensor | None:
    """Return the present nu (), or None if it is not learned."""
    log_nu = getattr(model, LOG_NU, None)
    if log_nu is None or not isinstance(loss, TieLoss):
        return None
    return loss.nu_of(whole(log_nu).view(()))


def nu_metric(model: Any, loss: RewardLoss) -> Metrics:
    """Return the present nu as a metric, if it is learned."""
    nu = learned_nu(model, loss)
    return {} if nu is None else {"nu": nu.item()}


def save_reward(
    model: Any,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    config: RewardConfig,
    data: TokenizedDataset,
    compute: Compute,
) -> None:
    """Write the reward model with the scale of its scores and, under a loss with ties, `tie_nu`."""
    measure_scale(model, data, compute, config.run.seed)
    nu = learned_nu(model, config.loss)
    if isinstance(config.loss, TieLoss):
        model.config.tie_model = config.loss.name
        model.config.tie_nu = config.loss.nu if nu is None else nu.item()
    save_reward_model(model, tokenizer, folder, leave_out=(LOG_NU,))
