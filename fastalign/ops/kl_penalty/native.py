"""Launchers of the C++ and CUDA kernels, behind the C ABI of `csrc/abi.h`."""

import ctypes

import torch
from torch import Tensor

from fastalign.ops.native_library import Argument, address, call

ESTIMATOR_CODES = {"k1": 0, "k2": 1, "k3": 2}


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def _new(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def forward(
    logprob: Tensor,  # (N,)
    reference_logprob: Tensor,  # (N,)
    bounds: Tensor,  # (R + 1,)
    score: Tensor | None,  # (R,)
    coefficient: float,
    adaptive_coefficient: Tensor | None,  # ()
    mask: Tensor | None,  # (N,) bool
    estimator: str,
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N,), (R,)
    """Reward, KL and its sums."""
    num_tokens, num_responses = logprob.shape[0], bounds.shape[0] - 1
    reward, kl = _new(num_tokens, logprob), _new(num_tokens, logprob)
    sequence_kl = _new(num_responses, logprob)
    packed = [value.contiguous() for value in (logprob, reference_logprob, bounds)]
    score, mask = _contiguous(score), _contiguous(mask)
    arguments: list[Argument] = [
        *map(address, packed),
        ctypes.c_int64(num_responses),
        address(score),
        ctypes.c_float(coefficient),
        address(adaptive_coefficient),
        address(mask),
        ctypes.c_int32(ESTIMATOR_CODES[estimator]),
        *map(address, (reward, kl, sequence_kl)),
    ]
    call("kl_penalty_forward", logprob.device, arguments)
    return reward, kl, sequence_kl


def backward(
    grad_kl: Tensor | None,  # (N,)
    grad_sequence_kl: Tensor | None,  # (R,)
    logprob: Tensor,  # (N,)
    reference_logprob: Tensor,  # (N,)
    bounds: Tensor,  # (R + 1,)
    mask: Tensor | None,  # (N,) bool
    estimator: str,
) -> Tensor:  # (N,)
    """The gradient of the log-probs."""
    gradient = _new(logprob.shape[0], logprob)
    upstream = [_contiguous(value) for value in (grad_kl, grad_sequence_kl)]
    packed = [value.contiguous() for value in (logprob, reference_logprob, bounds)]
    mask = _contiguous(mask)
    arguments: list[Argument] = [
        *map(address, (*upstream, *packed)),
        ctypes.c_int64(bounds.shape[0] - 1),
        address(mask),
        ctypes.c_int32(ESTIMATOR_CODES[estimator]),
        address(gradient),
    ]
    call("kl_penalty_backward", logprob.device, arguments)
    return gradient
