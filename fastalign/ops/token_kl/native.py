"""Launchers of the C++ and CUDA kernels, behind the C ABI of `csrc/abi.h`."""

import ctypes

import torch
from torch import Tensor

from fastalign.ops.native_library import DTYPE_CODES, Argument, address, call


class _Arguments:
    """The arguments that both kernels begin with, and the tensors that they point into."""

    def __init__(
        self,
        logits: Tensor,
        reference_logits: Tensor,
        temperature: Tensor | None,
        softcap: float | None,
        over_reference: bool,
        ignored: Tensor | None,
    ) -> None:
        sides = [x if x.stride(1) == 1 else x.contiguous() for x in (logits, reference_logits)]
        rows = None if temperature is None else temperature.to(torch.float32).contiguous()
        flags = None if ignored is None else ignored.contiguous()
        self._alive = (*sides, rows, flags)
        self.listed: list[Argument] = []
        for side in sides:
            code = ctypes.c_int32(DTYPE_CODES[side.dtype])
            self.listed += [address(side), code, ctypes.c_int64(side.stride(0))]
        self.listed += [ctypes.c_int64(size) for size in logits.shape]
        self.listed += [ctypes.c_float(softcap or 0.0), ctypes.c_int32(over_reference)]
        self.listed += [address(rows), address(flags)]


def forward(
    logits: Tensor,  # (T, V)
    reference_logits: Tensor,  # (T, V)
    temperature: Tensor | None,  # (T,)
    softcap: float | None,
    over_reference: bool,
    ignored: Tensor | None,  # (T,) bool
) -> tuple[Tensor, Tensor, Tensor]:  # each (T,) float32
    """KL and the two log-sum-exps."""
    arguments = _Arguments(logits, reference_logits, temperature, softcap, over_reference, ignored)
    kl, logsumexp, reference_logsumexp = (
        torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    places = [address(rows) for rows in (kl, logsumexp, reference_logsumexp)]
    call("token_kl_forward", logits.device, [*arguments.listed, *places])
    return kl, logsumexp, reference_logsumexp


def backward(
    grad_kl: Tensor,  # (T,)
    logits: Tensor,  # (T, V)
    reference_logits: Tensor,  # (T, V)
    temperature: Tensor | None,  # (T,)
    softcap: float | None,
    over_reference: bool,
    ignored: Tensor | None,  # (T,) bool
    kl: Tensor,  # (T,)
    logsumexp: Tensor,  # (T,)
    reference_logsumexp: Tensor,  # (T,)
) -> Tensor:  # (T, V)
    """The gradient of the logits, in their dtype."""
    arguments = _Arguments(logits, reference_logits, temperature, softcap, over_reference, ignored)
    grad_kl = grad_kl.contiguous()
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    tensors = (kl, logsumexp, reference_logsumexp, grad_kl, gradient)
    listed = [*arguments.listed, *(address(tensor) for tensor in tensors)]
    call("token_kl_backward", logits.device, listed)
    return gradient
