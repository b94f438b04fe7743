"""Triton kernels of `preference_loss`, one program a pair.

Sums, and a pair's few operations after them, are in float64: log(1 + e) is then accurate without a
log1p, which the interpreter lacks. `_pair_loss` is the `pair_loss` of `csrc/preference_pair.h`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.ops.backends import contiguous, new_rows
from fastalign.ops.preference_loss.formula import LinkFunction
from fastalign.ops.preference_loss.reference import Inputs

BLOCK = 1024
_HINGE = tl.constexpr(int(LinkFunction.HINGE))
_SQUARE = tl.constexpr(int(LinkFunction.SQUARE))
_DAVIDSON = tl.constexpr(int(LinkFunction.DAVIDSON))
_ORPO = tl.constexpr(int(LinkFunction.ORPO))
_EPSILON = tl.constexpr(torch.finfo(torch.float32).eps)


@triton.jit
def _softplus(x):
    return tl.where(x < 0.0, 0.0, x) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _logistic(x, tie, threshold, right, wrong, tie_offset):
    right = tl.where(tie, 1.0, right)
    wrong = tl.where(tie, 1.0, wrong)
    loss = right * _softplus(threshold - x) - tl.where(tie, tie_offset, 0.0)
    loss += wrong * _softplus(tl.where(wrong == 0.0, 0.0, threshold + x))  # 0 * inf is NaN
    slope = wrong * _sigmoid(threshold + x) - right * _sigmoid(threshold - x)
    return loss, slope


@triton.jit
def _davidson(x, tie, tie_offset):
    q = tl.exp(-tl.abs(x) / 2)
    tied = tl.exp(tie_offset - tl.abs(x) / 2)
    total = 1.0 + q * q + tied
    win = tl.where(x < 0.0, q * q, 1.0) / total
    loss = tl.where(x < 0.0, 1.0, q * q) / total
    slope = tl.where(tie, (win - loss) / 2, -loss - tied / total / 2)
    tail = tl.where(x < 0.0, -x, 0.0)
    return tl.log(total) + tl.where(tie, tl.abs(x) / 2 - tie_offset, tail), slope


@triton.jit
def _log_odds(logprob):
    certain = logprob > -_EPSILON
    bounded = tl.where(certain, -_EPSILON, logprob)
    less = 1.0 - tl.exp(bounded)
    return bounded - tl.log(less), tl.where(certain, 0.0, 1.0 / less)


@triton.jit
def _pair_loss(chosen, rejected, tie, numbers, LINK: tl.constexpr):
    """Compute a loss and its derivatives from each side's weighted log-ratio, weight and length."""
    ratio, weight, length = chosen
    other_ratio, other_weight, other_length = rejected
    beta, length_weight, threshold, right, wrong, tie_offset = numbers
    if LINK == _ORPO:
        odds, slope = _log_odds(ratio)
        other_odds, other_slope = _log_odds(other_ratio)
        pull = beta * _sigmoid(other_odds - odds)
        loss = beta * _softplus(other_odds - odds) - ratio
        by_chosen = weight * (-1.0 - pull * slope)
        by_rejected = other_weight * pull * other_slope
    else:
        x = beta * (ratio - other_ratio) + length_weight * (length - other_length)
        if LINK == _HINGE:
            loss = tl.where(x >= 1.0, 0.0, 1.0 - x)
            slope = tl.where(x >= 1.0, 0.0, -1.0)
        elif LINK == _SQUARE:
            loss = (x - threshold) * (x - threshold)
            slope = 2.0 * (x - threshold)
        elif LINK == _DAVIDSON:
            loss, slope = _davidson(x, tie, tie_offset)
        else:
            loss, slope = _logistic(x, tie, threshold, right, wrong, tie_offset)
        by_chosen = slope * beta * weight
        by_rejected = -slope * beta * other_weight
    return loss, by_chosen, by_rejected


@triton.jit
def _sequence(
    sequence,
    pointers,
    HAS_REFERENCE: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store a sequence's log-prob; return its weighted log-ratio, its weight and its length."""
    logprob_ptr, bounds_ptr, reference_ptr, length_ptr, sequence_logprob_ptr = pointers
    start = tl.load(bounds_ptr + sequence)
    stop = tl.load(bounds_ptr + sequence + 1)
    sums = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(start, stop, BLOCK):
        row = first + tl.arange(0, BLOCK)
        sums += tl.load(logprob_ptr + row, mask=row < stop, other=0.0).to(tl.float64)
    # Rounded as it is returned: a policy that equals its reference has a margin of exactly 0.
    logprob = tl.sum(sums, axis=0).to(tl.float32)
    tl.store(sequence_logprob_ptr + sequence, logprob)
    ratio = logprob.to(tl.float64)
    if HAS_REFERENCE:
        ratio -= tl.load(reference_ptr + sequence).to(tl.float64)
    length = (stop - start).to(tl.float64)
    if HAS_LENGTH:
        length = tl.load(length_ptr + sequence).to(tl.float64)
    weight = 1.0
    if PER_TOKEN:
        weight = 1.0 / tl.where(length < 1.0, 1.0, length)
    return ratio * weight, weight, length


@triton.jit
def preference_loss_fwd_kernel(
    logprob_ptr,
    bounds_ptr,
    reference_ptr,
    length_ptr,
    tie_ptr,
    losses_ptr,
    sequence_logprob_ptr,
    coefficient_ptr,
    beta,
    length_weight,
    threshold,
    right,
    wrong,
    tie_offset,
    LINK: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    HAS_TIE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one pair's sums, its loss, and the derivatives of the loss by the two sums."""
    pair = tl.program_id(0).to(tl.int64)
    pointers = (logprob_ptr, bounds_ptr, reference_ptr, length_ptr, sequence_logprob_ptr)
    chosen = _sequence(2 * pair, pointers, HAS_REFERENCE, HAS_LENGTH, PER_TOKEN, BLOCK)
    rejected = _sequence(2 * pair + 1, pointers, HAS_REFERENCE, HAS_LENGTH, PER_TOKEN, BLOCK)
    tie = pair < 0
    if HAS_TIE:
        tie = tl.load(tie_ptr + pair) != 0
    numbers = (beta, length_weight, threshold, right, wrong, tie_offset)
    loss, by_chosen, by_rejected = _pair_loss(chosen, rejected, tie, numbers, LINK)
    tl.store(losses_ptr + pair, loss.to(tl.float32))
    tl.store(coefficient_ptr + 2 * pair, by_chosen.to(tl.float32))
    tl.store(coefficient_ptr + 2 * pair + 1, by_rejected.to(tl.float32))


@triton.jit
def preference_loss_bwd_kernel(
    grad_losses_ptr,
    grad_sequence_logprob_ptr,
    coefficient_ptr,
    bounds_ptr,
    gradient_ptr,
    HAS_GRAD_SEQUENCE_LOGPROB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one pair's gradient: every token of a sequence gets the sequence's."""
    pair = tl.program_id(0).to(tl.int64)
    grad_loss = tl.load(grad_losses_ptr + pair)
    for side in range(2):
        sequence = 2 * pair + side
        value = grad_loss * tl.load(coefficient_ptr + sequence)
        if HAS_GRAD_SEQUENCE_LOGPROB:
            value += tl.load(grad_sequence_logprob_ptr + sequence)
        stop = tl.load(bounds_ptr + sequence + 1)
        for first in range(tl.load(bounds_ptr + sequence), stop, BLOCK):
            row = first + tl.arange(0, BLOCK)
            tl.store(gradient_ptr + row, value + tl.zeros([BLOCK], tl.float32), mask=row < stop)


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:  # (B,), (2B,), (2B,) float32
    """Return losses, sequence log-probs, and each loss's derivatives by those."""
    num_sequences = inputs.bounds.shape[0] - 1
    (losses,) = new_rows(1, num_sequences // 2, inputs.logprob)
    sequence_logprob, coefficient = new_rows(2, num_sequences, inputs.logprob)
    if num_sequences:
        bounds = inputs.bounds.to(torch.int64).contiguous()
        reference_logprob = contiguous(inputs.reference_logprob, torch.float32)
        length = contiguous(inputs.length, torch.int64)
        preference_loss_fwd_kernel[(num_sequences // 2,)](
            inputs.logprob.contiguous(),
            bounds,
            losses if reference_logprob is None else reference_logprob,  # an unused pointer
            bounds if length is None else length,
            losses if inputs.tie is None else inputs.tie.contiguous().view(torch.int8),
            losses,
            sequence_logprob,
            coefficient,
            *inputs.numbers,
            LINK=inputs.link,
            PER_TOKEN=inputs.per_token,
            HAS_REFERENCE=reference_logprob is not None,
            HAS_LENGTH=length is not None,
            HAS_TIE=inputs.tie is not None,
            BLOCK=BLOCK,
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
    if num_rows:
        grad_losses = grad_losses.contiguous()
        rest = contiguous(grad_sequence_logprob)
        preference_loss_bwd_kernel[(grad_losses.shape[0],)](
            grad_losses,
            grad_losses if rest is None else rest,
            coefficient,
            bounds.to(torch.int64).contiguous(),
            gradient,
            HAS_GRAD_SEQUENCE_LOGPROB=rest is not None,
            BLOCK=BLOCK,
        )
    return gradient
