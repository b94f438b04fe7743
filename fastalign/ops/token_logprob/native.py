"""Launchers of the C++ and CUDA kernels, behind the C ABI of `csrc/abi.h`."""

import ctypes
import os

import torch
from torch import Tensor

from fastalign.ops.native_library import DTYPE_CODES, ISA_CODES, address, load

Argument = ctypes.c_int32 | ctypes.c_int64 | ctypes.c_float | ctypes.c_void_p


def _place(device: torch.device) -> list[Argument]:
    """The arguments that say where and how wide: threads and instruction set, or the stream."""
    if device.type == "cuda":
        return [ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)]
    isa = os.environ.get("FASTALIGN_CPU_ISA", "best")
    if isa not in ISA_CODES:
        raise ValueError(f"FASTALIGN_CPU_ISA: expected one of {', '.join(ISA_CODES)}, got {isa!r}")
    return [ctypes.c_int32(torch.get_num_threads()), ctypes.c_int32(ISA_CODES[isa])]


def _call(name: str, device: torch.device, arguments: list[Argument]) -> None:
    function = getattr(load(device.type), f"fastalign_{name}_{device.type}")
    function.restype = ctypes.c_int32
    code = function(*arguments, *_place(device))
    if code == 1:
        raise ValueError("FASTALIGN_CPU_ISA: this processor or this build does not have it")
    assert code == 0, f"{name}: native code returned {code}"


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
    _call("token_logprob_forward", logits.device, arguments)
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
    _call("token_logprob_backward", logits.device, arguments)
    return gradient
