"""Launchers of the C++ and CUDA kernels, behind the C ABI of `csrc/abi.h`."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastalign.ops.native_library import address, call


def _as(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype).contiguous()


def forward(
    logprob: Tensor,  # (N,)
    bounds: Tensor,  # (2B + 1,)
    reference_logprob: Tensor | None,  # (2B,)
    length: Tensor | None,  # (2B,)
    tie: Tensor | None,  # (B,)
    link: int,
    per_token: bool,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # (B,), (2B,), (2B,)
    """Losses, sequence log-probs, and each loss's derivatives by those."""
    num_sequences = bounds.shape[0] - 1
    losses, sequence_logprob, coefficient = (
        torch.empty(size, dtype=torch.float32, device=logprob.device)
        for size in (num_sequences // 2, num_sequences, num_sequences)
    )
    tensors = (
        logprob.contiguous(),
        _as(bounds, torch.int64),
        _as(reference_logprob, torch.float32),
        _as(length, torch.int64),
        _as(tie, torch.bool),
    )
    call(
        "preference_loss_forward",
        logprob.device,
        [
            *(address(value) for value in tensors),
            ctypes.c_int64(num_sequences // 2),
            ctypes.c_int32(link),
            ctypes.c_int32(per_token),
            *(ctypes.c_float(number) for number in numbers),
            *(address(value) for value in (losses, sequence_logprob, coefficient)),
        ],
    )
    return losses, sequence_logprob, coefficient


def backward(
    grad_losses: Tensor,  # (B,)
    grad_sequence_logprob: Tensor | None,  # (2B,)
    coefficient: Tensor,  # (2B,)
    bounds: Tensor,  # (2B + 1,)
    num_rows: int,
) -> Tensor:  # (N,)
    """The gradient of the tokens' log-probs."""
    gradient = torch.empty(num_rows, dtype=torch.float32, device=coefficient.device)
    tensors = (
        grad_losses.contiguous(),
        _as(grad_sequence_logprob, torch.float32),
        coefficient,
        _as(bounds, torch.int64),
    )
    call(
        "preference_loss_backward",
        coefficient.device,
        [
            *(address(value) for value in tensors),
            ctypes.c_int64(grad_losses.shape[0]),
            address(gradient),
        ],
    )
    return gradient
