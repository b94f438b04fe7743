"""Launchers of the C++ and CUDA kernels, through the C ABI of `csrc/abi.h`."""

import ctypes

import torch
from torch import Tensor

from fastalign.ops.backends import contiguous, new_rows
from fastalign.ops.native_library import call
from fastalign.ops.preference_loss.reference import Inputs


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:  # (B,), (2B,), (2B,) float32
    """Return losses, sequence log-probs, and each loss's derivatives by those."""
    num_sequences = inputs.bounds.shape[0] - 1
    (losses,) = new_rows(1, num_sequences // 2, inputs.logprob)
    sequence_logprob, coefficient = new_rows(2, num_sequences, inputs.logprob)
    call(
        "preference_loss_forward",
        inputs.logprob.device,
        [
            inputs.logprob.contiguous(),
            contiguous(inputs.bounds, torch.int64),
            contiguous(inputs.reference_logprob, torch.float32),
            contiguous(inputs.length, torch.int64),
            contiguous(inputs.tie),
            ctypes.c_int64(num_sequences // 2),
            ctypes.c_int32(inputs.link),
            ctypes.c_int32(inputs.per_token),
            *(ctypes.c_float(number) for number in inputs.numbers),
            losses,
            sequence_logprob,
            coefficient,
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
    """Return the gradient of the tokens' log-probs."""
    (gradient,) = new_rows(1, num_rows, coefficient)
    call(
        "preference_loss_backward",
        coefficient.device,
        [
            grad_losses.contiguous(),
            contiguous(grad_sequence_logprob, torch.float32),
            coefficient,
            contiguous(bounds, torch.int64),
            ctypes.c_int64(grad_losses.shape[0]),
            gradient,
        ],
    )
    return gradient
