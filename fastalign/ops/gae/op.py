"""Registration of `gae`: one schema with the backend as argument, one fake, no gradient."""

from types import ModuleType

import torch
from torch import Tensor

from fastalign.ops.backends import on_device
from fastalign.ops.gae import reference


def _module(backend: str) -> ModuleType:
    """The backend's launcher, `forward`."""
    if backend == "native":
        from fastalign.ops.gae import native

        return native
    if backend == "triton":
        from fastalign.ops.gae import triton_kernels

        return triton_kernels
    return reference


@torch.library.custom_op("fastalign::gae", mutates_args=())
def gae_forward(
    reward: Tensor,
    value: Tensor,
    bounds: Tensor,
    bootstrap_value: Tensor | None,
    gamma: float,
    gae_lambda: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each (N,)."""
    with on_device(reward):
        results: tuple[Tensor, Tensor] = _module(backend).forward(
            reward, value, bounds, bootstrap_value, gamma, gae_lambda
        )
    return results


@gae_forward.register_fake
def _forward_fake(
    reward: Tensor,
    value: Tensor,
    bounds: Tensor,
    bootstrap_value: Tensor | None,
    gamma: float,
    gae_lambda: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return reward.new_empty(reward.shape), reward.new_empty(reward.shape)
