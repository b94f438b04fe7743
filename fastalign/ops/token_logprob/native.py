"""Launchers of the C++ and CUDA kernels, through the C ABI of `csrc/abi.h`."""

import ctypes

import torch
from torch import Tensor

from fastalign.ops.backends import contiguous, new_rows, unit_columns
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


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:  # each (T,) float32
    """Return log-prob, entropy and log-sum-exp."""
    logprob, entropy, logsumexp = new_rows(3, inputs.logits.shape[0], inputs.logits)
    results = (logprob, entropy, logsumexp)
    call("token_logprob_forward", inputs.logits.device, [*_arguments(inputs), *results])
    return results


def backward(
    inputs: Inputs,
    entropy: Tensor,  # (T,)
    logsumexp: Tensor,  # (T,)
    grad_logprob: Tensor,  # (T,)
    grad_entropy: Tensor | None,  # (T,)
) -> Tensor:  # (T, V)
    """Return the gradient of the logits, in their dtype."""
    logits = inputs.logits
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    upstream = (grad_logprob.contiguous(), contiguous(grad_entropy, torch.float32))
    rows = (logsumexp, entropy, *upstream, gradient)
    call("token_logprob_backward", logits.device, [*_arguments(inputs), *rows])
    return gradient
