"""Launchers of the C++ and CUDA kernels, through the C ABI of `csrc/abi.h`."""

import ctypes

import torch
from torch import Tensor

from fastalign.ops.backends import contiguous, gradient_rows, new_rows, unit_columns
from fastalign.ops.native_library import DTYPE_CODES, Argument, call
from fastalign.ops.token_logprob.reference import Inputs


def _arguments(inputs: Inputs) -> list[Argument | Tensor | None]:
    """Return the arguments that both kernels begin with."""
    logits = unit_columns(inputs.logits)
    return [
        logits,
        ctypes.c_int32(DTYPE_CODES[logits.dtype]),
        ctypes.c_int64(logits.shape[0]),
        ctypes.c_int64(logits.shape[1]),
        ctypes.c_int64(logits.stride(0)),
        ctypes.c_float(inputs.softcap or 0.0),
        ctypes.c_int64(inputs.ignore_index),
        inputs.targets.contiguous(),
        contiguous(inputs.temperature, torch.float32),
    ]


def forward(inputs: Inputs) -> list[Tensor]:  # each (T,) float32
    """Return log-prob, entropy, maximum of u and log sum exp(z - max z)."""
    results = new_rows(4, inputs.logits.shape[0], inputs.logits)
    call("token_logprob_forward", inputs.logits.device, [*_arguments(inputs), *results])
    return results


def backward(inputs: Inputs, *rows: Tensor | None) -> Tensor:  # (T, V)
    """Return the gradient of the logits, in their dtype; `rows` as in `reference.backward`."""
    gradient = gradient_rows(inputs.logits, "native")
    arguments = [*_arguments(inputs), *map(contiguous, rows), gradient]
    call("token_logprob_backward", inputs.logits.device, arguments)
    return gradient
