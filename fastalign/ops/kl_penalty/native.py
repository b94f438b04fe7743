"""Launchers of the C++ and CUDA kernels, through the C ABI of `csrc/abi.h`."""

import ctypes

from torch import Tensor

from fastalign.ops.backends import contiguous, new_rows
from fastalign.ops.kl_penalty.reference import Inputs
from fastalign.ops.native_library import call

ESTIMATOR_CODES = {"k1": 0, "k2": 1, "k3": 2}


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N,), (R,) float32
    """Return the reward, the KL and its sums."""
    num_tokens, num_responses = inputs.logprob.shape[0], inputs.bounds.shape[0] - 1
    reward, kl = new_rows(2, num_tokens, inputs.logprob)
    (sequence_kl,) = new_rows(1, num_responses, inputs.logprob)
    call(
        "kl_penalty_forward",
        inputs.logprob.device,
        [
            inputs.logprob.contiguous(),
            inputs.reference_logprob.contiguous(),
            inputs.bounds.contiguous(),
            ctypes.c_int64(num_responses),
            contiguous(inputs.score),
            ctypes.c_float(inputs.coefficient),
            inputs.adaptive_coefficient,
            contiguous(inputs.mask),
            ctypes.c_int32(ESTIMATOR_CODES[inputs.estimator]),
            ctypes.c_float(inputs.max_k3),
            reward,
            kl,
            sequence_kl,
        ],
    )
    return reward, kl, sequence_kl


def backward(
    inputs: Inputs,
    grad_kl: Tensor | None,  # (N,)
    grad_sequence_kl: Tensor | None,  # (R,)
) -> Tensor:  # (N,)
    """Return the gradient of the log-probs."""
    (gradient,) = new_rows(1, inputs.logprob.shape[0], inputs.logprob)
    call(
        "kl_penalty_backward",
        inputs.logprob.device,
        [
            contiguous(grad_kl),
            contiguous(grad_sequence_kl),
            inputs.logprob.contiguous(),
            inputs.reference_logprob.contiguous(),
            inputs.bounds.contiguous(),
            ctypes.c_int64(inputs.bounds.shape[0] - 1),
            contiguous(inputs.mask),
            ctypes.c_int32(ESTIMATOR_CODES[inputs.estimator]),
            ctypes.c_float(inputs.max_k3),
            gradient,
        ],
    )
    return gradient
