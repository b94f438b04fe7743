"""Triton kernels of `token_logprob`, one program a row.

The forward reads the logits once; the backward reads and writes once. Arithmetic is float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.ops.backends import contiguous, new_rows, unit_columns
from fastalign.ops.token_logprob.reference import Inputs
from fastalign.ops.triton_softmax import add_block, tanh, transform
from fastalign.ops.triton_table import launch_options


@triton.jit
def token_logprob_fwd_kernel(
    logits_ptr,
    targets_ptr,
    temperature_ptr,
    logprob_ptr,
    entropy_ptr,
    logsumexp_ptr,
    row_stride,
    num_columns,
    softcap,
    ignore_index,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reduce one row to its maximum m and the sums of exp(z - m) and (z - m) exp(z - m), online.

    With S and U the two sums, logsumexp = m + log S and the entropy is log S - U / S.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    scale = 1.0
    if HAS_TEMPERATURE:
        scale = 1.0 / tl.load(temperature_ptr + row)
    start_ptr = logits_ptr + row * row_stride
    m = -float("inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_columns
        x = tl.load(start_ptr + column, mask=inside, other=-float("inf")).to(tl.float32)
        z = tl.where(inside, transform(x, softcap, scale, HAS_SOFTCAP), -float("inf"))
        m, total, weighted = add_block(m, total, weighted, z)
    log_total = tl.log(total)
    ignored = target == ignore_index
    # An ignored target is no column, so its row reads column 0 and discards it.
    x = tl.load(start_ptr + tl.where(ignored, 0, target)).to(tl.float32)
    logprob = transform(x, softcap, scale, HAS_SOFTCAP) - m - log_total
    entropy = log_total - weighted / total
    # Rounding may leave it slightly below zero; tl.maximum would drop a NaN.
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    tl.store(logprob_ptr + row, tl.where(ignored, 0.0, logprob))
    tl.store(entropy_ptr + row, tl.where(ignored, 0.0, entropy))
    tl.store(logsumexp_ptr + row, m + log_total)


@triton.jit
def token_logprob_bwd_kernel(
    logits_ptr,
    targets_ptr,
    temperature_ptr,
    logsumexp_ptr,
    entropy_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    gradient_ptr,
    row_stride,
    num_columns,
    softcap,
    ignore_index,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row's gradient, [g (1[v = y] - p) - e p (log p + H)] dz / dlogit.

    g and e are the gradients of log-prob and entropy; p comes back from the log-sum-exp, so one
    read is enough.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    ignored = target == ignore_index
    scale = 1.0
    if HAS_TEMPERATURE:
        scale = 1.0 / tl.load(temperature_ptr + row)
    logsumexp = tl.load(logsumexp_ptr + row)
    g = tl.load(grad_logprob_ptr + row)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_columns
        x = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
        slope = scale
        if HAS_SOFTCAP:
            t = tanh(x / softcap)
            x = softcap * t
            slope = scale * (1.0 - t * t)
        log_p = x * scale - logsumexp
        p = tl.exp(log_p)
        gradient = g * (tl.where(column == target, 1.0, 0.0) - p)
        if HAS_GRAD_ENTROPY:
            bracket = tl.where(log_p < -1e30, -1e30, log_p) + tl.load(entropy_ptr + row)
            gradient -= tl.load(grad_entropy_ptr + row) * p * bracket
        gradient = tl.where(ignored, 0.0, gradient * slope)
        place = gradient_ptr + row * num_columns + column
        tl.store(place, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


def _options(kernel: str, inputs: Inputs, logits: Tensor) -> dict[str, Any]:
    return {
        "row_stride": logits.stride(0),
        "num_columns": logits.shape[1],
        "softcap": 1.0 if inputs.softcap is None else inputs.softcap,
        "ignore_index": inputs.ignore_index,
        "HAS_TEMPERATURE": inputs.temperature is not None,
        "HAS_SOFTCAP": inputs.softcap is not None,
        **launch_options(kernel, logits.shape[1], logits.device),
    }


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:  # each (T,) float32
    """Return log-prob, entropy and log-sum-exp."""
    logits = unit_columns(inputs.logits)
    num_rows = logits.shape[0]
    logprob, entropy, logsumexp = new_rows(3, num_rows, logits)
    if num_rows:
        temperature = contiguous(inputs.temperature, torch.float32)
        token_logprob_fwd_kernel[(num_rows,)](
            logits,
            inputs.targets.contiguous(),
            logprob if temperature is None else temperature,  # an unused pointer
            logprob,
            entropy,
            logsumexp,
            **_options("token_logprob_fwd_kernel", inputs, logits),
        )
    return logprob, entropy, logsumexp


def backward(
    inputs: Inputs,
    entropy: Tensor,  # (T,)
    logsumexp: Tensor,  # (T,)
    grad_logprob: Tensor,  # (T,)
    grad_entropy: Tensor | None,  # (T,)
) -> Tensor:  # (T, V)
    """Return the gradient of the logits, in their dtype."""
    logits = unit_columns(inputs.logits)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.shape[0]:
        temperature = contiguous(inputs.temperature, torch.float32)
        grad_entropy = contiguous(grad_entropy, torch.float32)
        token_logprob_bwd_kernel[(logits.shape[0],)](
            logits,
            inputs.targets.contiguous(),
            logsumexp if temperature is None else temperature,
            logsumexp,
            entropy,
            grad_logprob.contiguous(),
            logsumexp if grad_entropy is None else grad_entropy,
            gradient,
            HAS_GRAD_ENTROPY=grad_entropy is not None,
            **_options("token_logprob_bwd_kernel", inputs, logits),
        )
    return gradient
