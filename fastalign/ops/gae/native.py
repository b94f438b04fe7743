"""Launcher of the C++ and CUDA kernels, behind the C ABI of `csrc/abi.h`."""

import ctypes

import torch
from torch import Tensor

from fastalign.ops.native_library import Argument, address, call


def forward(
    reward: Tensor,  # (N,)
    value: Tensor,  # (N,)
    bounds: Tensor,  # (R + 1,)
    bootstrap_value: Tensor | None,  # (R,)
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """Advantages and returns."""
    advantage = torch.empty(reward.shape, dtype=torch.float32, device=reward.device)
    returns = torch.empty(reward.shape, dtype=torch.float32, device=reward.device)
    packed = [tensor.contiguous() for tensor in (reward, value, bounds)]
    bootstrap_value = None if bootstrap_value is None else bootstrap_value.contiguous()
    arguments: list[Argument] = [
        *map(address, packed),
        ctypes.c_int64(bounds.shape[0] - 1),
        address(bootstrap_value),
        ctypes.c_double(gamma),
        ctypes.c_double(gae_lambda),
        address(advantage),
        address(returns),
    ]
    call("gae", reward.device, arguments)
    return advantage, returns
