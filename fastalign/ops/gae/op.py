"""Registration of `gae`: one schema with the backend as argument, one fake, no gradient."""

from typing import Any

import torch
from torch import Tensor

from fastalign.ops.backends import on_device
from fastalign.ops.gae.reference import Inputs
from fastalign.ops.registration import arguments_of, kernels


@torch.library.custom_op(
    "fastalign::gae", mutates_args=(), schema=f"({arguments_of(Inputs)}) -> (Tensor, Tensor)"
)
def gae_forward(*arguments: Any) -> Any:
    """Return advantages and returns, each (N,)."""
    inputs = Inputs(*arguments)
    with on_device(inputs.reward):
        return kernels("gae", inputs.backend).forward(inputs)


@gae_forward.register_fake
def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    reward = Inputs(*arguments).reward
    return reward.new_empty(reward.shape), reward.new_empty(reward.shape)
