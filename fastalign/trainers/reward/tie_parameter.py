"""The tie parameter nu that a reward model's loss may learn, and where it is kept."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.data import Tokenizer
from fastalign.models import save_reward_model
from fastalign.ranks.whole_weights import whole
from fastalign.trainers.reward.config import RewardConfig
from fastalign.trainers.reward.losses import RewardLoss, TieLoss

# The name of the learned tie parameter on the model; the saved model's config holds its nu.
LOG_NU = "log_nu"


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
    # One element in a row: FSDP2 shards no scalars.
    parameter = nn.Parameter(torch.tensor([loss.log_nu], device=model.device))
    parameter.lr_scale = loss.nu_lr / config.optim.lr  # type: ignore[attr-defined]
    model.register_parameter(LOG_NU, parameter)


def learned_nu(model: Any, loss: RewardLoss) -> Tensor | None:
    """Nu () as it stands, or None where it is not learned."""
    log_nu = getattr(model, LOG_NU, None)
    if log_nu is None or not isinstance(loss, TieLoss):
        return None
    return loss.nu_of(whole(log_nu).view(()))


def save_with_nu(model: Any, tokenizer: Tokenizer, folder: Path, *, loss: RewardLoss) -> None:
    """Writes the reward model; its configuration says how likely ties are (`tie_nu`)."""
    nu = learned_nu(model, loss)
    if isinstance(loss, TieLoss):
        model.config.tie_model = type(loss).of_labels.__name__
        model.config.tie_nu = loss.nu if nu is None else nu.item()
    save_reward_model(model, tokenizer, folder, leave_out=(LOG_NU,))
