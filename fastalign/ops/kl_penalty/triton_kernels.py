"""Triton kernels of `kl_penalty`, one program a response; float32, with sums in float64."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.ops.backends import new_rows
from fastalign.ops.kl_penalty.reference import Inputs

MAX_BLOCK = 1024


@triton.jit
def _series(x):
    """Compute exp(-x) - 1 + x for |x| < 0.5 by its series, for its terms would cancel."""
    p = 1.0 / 5040 - x * (1.0 / 40320 - x * (1.0 / 362880))
    p = 1.0 / 24 - x * (1.0 / 120 - x * (1.0 / 720 - x * p))
    return x * x * (0.5 - x * (1.0 / 6 - x * p))


@triton.jit
def _unbounded_k3(x):
    return tl.where(tl.abs(x) < 0.5, _series(x), tl.exp(-x) - 1.0 + x)


@triton.jit
def _estimate(x, max_k3, ESTIMATOR: tl.constexpr):
    if ESTIMATOR == "k1":
        kl = x
    elif ESTIMATOR == "k2":
        kl = x * x * 0.5
    else:
        kl = _unbounded_k3(tl.where(x < -20.0, -20.0, x))
        kl = tl.where(kl > max_k3, max_k3, kl)  # tl.minimum would drop a NaN
    return kl


@triton.jit
def _slope(x, max_k3, ESTIMATOR: tl.constexpr):
    if ESTIMATOR == "k1":
        slope = 1.0
    elif ESTIMATOR == "k2":
        slope = x
    else:
        y = tl.where(x < -20.0, -20.0, x)  # whose exponential is finite
        slope = tl.where(tl.abs(y) < 0.5, y - _series(y), 1.0 - tl.exp(-y))
        slope = tl.where((x < -20.0) | (_unbounded_k3(y) > max_k3), 0.0, slope)
    return slope


@triton.jit
def _log_ratio(logprob_ptr, reference_ptr, mask_ptr, token, inside, HAS_MASK: tl.constexpr):
    """Load the log-ratio, 0 at tokens that do not count, and the tokens that do."""
    counts = inside
    if HAS_MASK:
        counts = tl.load(mask_ptr + token, mask=inside, other=0) != 0
    x = tl.load(logprob_ptr + token, mask=counts, other=0.0)
    x -= tl.load(reference_ptr + token, mask=counts, other=0.0)
    return tl.where(counts, x, 0.0), counts


@triton.jit
def kl_penalty_fwd_kernel(
    logprob_ptr,
    reference_ptr,
    bounds_ptr,
    score_ptr,
    adaptive_ptr,
    mask_ptr,
    reward_ptr,
    kl_ptr,
    sequence_kl_ptr,
    coefficient,
    max_k3,
    ESTIMATOR: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    HAS_ADAPTIVE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find one response's last token that counts, then compute KL and reward block by block."""
    response = tl.program_id(0).to(tl.int64)
    begin = tl.load(bounds_ptr + response)
    end = tl.load(bounds_ptr + response + 1)
    if HAS_ADAPTIVE:
        coefficient = tl.load(adaptive_ptr)
    score = 0.0
    last = end - 1
    if HAS_SCORE:
        score = tl.load(score_ptr + response)
        if HAS_MASK:
            # A first pass over the mask: the score belongs to one token, which must be known.
            last = begin - 1
            for start in range(begin, end, BLOCK):
                token = start + tl.arange(0, BLOCK)
                counts = tl.load(mask_ptr + token, mask=token < end, other=0) != 0
                last = tl.maximum(last, tl.max(tl.where(counts, token, begin - 1), axis=0))
    total = tl.full((), 0.0, tl.float64)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < end
        x, counts = _log_ratio(logprob_ptr, reference_ptr, mask_ptr, token, inside, HAS_MASK)
        kl = _estimate(x, max_k3, ESTIMATOR)
        reward = tl.where(counts, -coefficient * kl, 0.0)
        if HAS_SCORE:
            reward += tl.where(token == last, score, 0.0)
        tl.store(kl_ptr + token, kl, mask=inside)
        tl.store(reward_ptr + token, reward, mask=inside)
        total += tl.sum(kl.to(tl.float64), axis=0)
    if HAS_SCORE:
        # No token takes the score: NaN, since a kernel cannot raise.
        total = tl.where(last < begin, float("nan"), total)
    tl.store(sequence_kl_ptr + response, total.to(tl.float32))


@triton.jit
def kl_penalty_bwd_kernel(
    grad_kl_ptr,
    grad_sequence_kl_ptr,
    logprob_ptr,
    reference_ptr,
    bounds_ptr,
    mask_ptr,
    gradient_ptr,
    max_k3,
    ESTIMATOR: tl.constexpr,
    HAS_GRAD_KL: tl.constexpr,
    HAS_GRAD_SEQUENCE_KL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one response's gradient, (grad_kl + grad_sequence_kl) * slope."""
    response = tl.program_id(0).to(tl.int64)
    end = tl.load(bounds_ptr + response + 1)
    of_sequence = 0.0
    if HAS_GRAD_SEQUENCE_KL:
        of_sequence = tl.load(grad_sequence_kl_ptr + response)
    for start in range(tl.load(bounds_ptr + response), end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < end
        x, counts = _log_ratio(logprob_ptr, reference_ptr, mask_ptr, token, inside, HAS_MASK)
        upstream = of_sequence
        if HAS_GRAD_KL:
            upstream += tl.load(grad_kl_ptr + token, mask=inside, other=0.0)
        gradient = tl.where(counts, upstream * _slope(x, max_k3, ESTIMATOR), 0.0)
        tl.store(gradient_ptr + token, gradient, mask=inside)


def _contiguous(value: Tensor | None, unused: Tensor) -> Tensor:
    """Return a kernel's operand; `unused` for what is None and not read."""
    return unused if value is None else value.contiguous()


def _mask_bytes(inputs: Inputs, unused: Tensor) -> Tensor:
    return unused if inputs.mask is None else inputs.mask.view(torch.uint8).contiguous()


def _options(inputs: Inputs) -> dict[str, Any]:
    num_tokens = max(inputs.logprob.shape[0], 1)
    return {
        "max_k3": inputs.max_k3,
        "ESTIMATOR": inputs.estimator,
        "HAS_MASK": inputs.mask is not None,
        "BLOCK": min(MAX_BLOCK, triton.next_power_of_2(num_tokens)),
        "num_warps": 4,
    }


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N,), (R,) float32
    """Return the reward, the KL and its sums."""
    num_tokens, num_responses = inputs.logprob.shape[0], inputs.bounds.shape[0] - 1
    reward, kl = new_rows(2, num_tokens, inputs.logprob)
    (sequence_kl,) = new_rows(1, num_responses, inputs.logprob)
    if num_responses:
        logprob = inputs.logprob.contiguous()
        kl_penalty_fwd_kernel[(num_responses,)](
            logprob,
            inputs.reference_logprob.contiguous(),
            inputs.bounds.contiguous(),
            _contiguous(inputs.score, logprob),
            _contiguous(inputs.adaptive_coefficient, logprob),
            _mask_bytes(inputs, logprob),
            reward,
            kl,
            sequence_kl,
            inputs.coefficient,
            HAS_SCORE=inputs.score is not None,
            HAS_ADAPTIVE=inputs.adaptive_coefficient is not None,
            **_options(inputs),
        )
    return reward, kl, sequence_kl


def backward(
    inputs: Inputs,
    grad_kl: Tensor | None,  # (N,)
    grad_sequence_kl: Tensor | None,  # (R,)
) -> Tensor:  # (N,)
    """Return the gradient of the log-probs."""
    num_responses = inputs.bounds.shape[0] - 1
    (gradient,) = new_rows(1, inputs.logprob.shape[0], inputs.logprob)
    if num_responses:
        logprob = inputs.logprob.contiguous()
        kl_penalty_bwd_kernel[(num_responses,)](
            _contiguous(grad_kl, logprob),
            _contiguous(grad_sequence_kl, logprob),
            logprob,
            inputs.reference_logprob.contiguous(),
            inputs.bounds.contiguous(),
            _mask_bytes(inputs, logprob),
            gradient,
            HAS_GRAD_KL=grad_kl is not None,
            HAS_GRAD_SEQUENCE_KL=grad_sequence_kl is not None,
            **_options(inputs),
        )
    return gradient
