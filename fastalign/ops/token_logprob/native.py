"""Launchers of the C++ and CUDA kernels, behind the C ABI of `csrc/abi.h`."""

import ctypes

import torch
from torch import Tensor

from fastalign.ops.native_library import DTYPE_CODES, Argument, address, call


def _rows(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(torch.float32).contiguous()


def _shape(logits: Tensor, softcap: float | None, ignore_index: int) -> list[Argument]:
    return [
        ctypes.c_int32(DTYPE_CODES[logits.dtype]),
        ctypes.c_int64(logits.shape[0]),
        ctypes.c_int64(logits.shape[1]),
        ctypes.c_int64(logits.stride(0)),
        ctypes.c_float(softcap or 0.0),
        ctypes.c_int64(ignore_index),
    ]


def _with_unit_columns(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def forward(
    logits: Tensor,  # (T, V)
    targets: Tensor,  # (T,)
    temperature: Tensor | None,  # (T,)
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # each (T,) float32
    """Log-prob, entropy and log-sum-exp."""
    logits, targets, temperature = (
        _with_unit_columns(logits),
        targets.contiguous(),
        _rows(temperature),
    )

    def new_rows() -> Tensor:
        return torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)

    logprob, entropy, logsumexp = new_rows(), new_rows(), new_rows()
    arguments = [address(logits), *_shape(logits, softcap, ignore_index)]
    tensors = (targets, temperature, logprob, entropy, logsumexp)
    arguments += [address(tensor) for tensor in tensors]
    call("token_logprob_forward", logits.device, arguments)
    return logprob, entropy, logsumexp


def backward(
    grad_logprob: Tensor,  # (T,)
    grad_entropy: Tensor | None,  # (T,)
    logits: Tensor,  # (T, V)
    targets: Tensor,  # (T,)
    temperature: Tensor | None,  # (T,)
    softcap: float | None,
    ignore_index: int,
    logsumexp: Tensor,  # (T,)
    entropy: Tensor,  # (T,)
) -> Tensor:  # (T, V)
    """The gradient of the logits, in their dtype."""
    logits, targets, temperature = (
        _with_unit_columns(logits),
        targets.contiguous(),
        _rows(temperature),
    )
    grad_logprob, of_entropy = grad_logprob.contiguous(), _rows(grad_entropy)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    arguments = [address(logits), *_shape(logits, softcap, ignore_index)]
    tensors = (
        targets,
        temperature,
        logsumexp,
        entropy,
        grad_logprob,
        of_entropy,
        gradient,
    )
    arguments += [address(tensor) for tensor in tensors]
    call("token_logprob_backward", logits.device, arguments)
    return gradient
