"""Launcher of the C++ and CUDA kernels, through the C ABI of `csrc/abi.h`."""

import ctypes

from torch import Tensor

from fastalign.ops.backends import contiguous, new_rows
from fastalign.ops.gae.reference import Inputs
from fastalign.ops.native_library import call


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:  # (N,), (N,) float32
    """Return advantages and returns."""
    advantage, returns = new_rows(2, inputs.reward.shape[0], inputs.reward)
    call(
        "gae",
        inputs.reward.device,
        [
            inputs.reward.contiguous(),
            inputs.value.contiguous(),
            inputs.bounds.contiguous(),
            ctypes.c_int64(inputs.bounds.shape[0] - 1),
            contiguous(inputs.bootstrap_value),
            ctypes.c_double(inputs.gamma),
            ctypes.c_double(inputs.gae_lambda),
            advantage,
            returns,
        ],
    )
    return advantage, returns
