"""Launchers of the C++ and CUDA kernels, through the C ABI of `csrc/abi.h`."""

import ctypes

import torch
from torch import Tensor

from fastalign.ops.backends import contiguous, gradient_rows, new_rows, unit_columns
from fastalign.ops.native_library import DTYPE_CODES, Argument, call
from fastalign.ops.token_kl.reference import Inputs


def _arguments(inputs: Inputs) -> list[Argument | Tensor | None]:
    """Return the arguments that both kernels begin with."""
    listed: list[Argument | Tensor | None] = []
    for side in map(unit_columns, (inputs.logits, inputs.reference_logits)):
        code = ctypes.c_int32(DTYPE_CODES[side.dtype])
        listed += [side, code, ctypes.c_int64(side.stride(0))]
    listed += [ctypes.c_int64(size) for size in inputs.logits.shape]
    listed += [ctypes.c_float(inputs.softcap or 0.0), ctypes.c_int32(inputs.over_reference)]
    return [*listed, contiguous(inputs.temperature, torch.float32), contiguous(inputs.ignored)]


def forward(inputs: Inputs) -> list[Tensor]:  # each (T,) float32
    """Return the KL, and each side's maximum and log sum exp(z - max z)."""
    results = new_rows(5, inputs.logits.shape[0], inputs.logits)
    call("token_kl_forward", inputs.logits.device, [*_arguments(inputs), *results])
    return results


def backward(inputs: Inputs, *rows: Tensor) -> Tensor:  # (T, V)
    """Return the gradient of the logits, in their dtype; `rows` as in `reference.backward`."""
    gradient = gradient_rows(inputs.logits, "native")
    arguments = [*_arguments(inputs), *map(contiguous, rows), gradient]
    call("token_kl_backward", inputs.logits.device, arguments)
    return gradient
