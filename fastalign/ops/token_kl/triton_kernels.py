"""Triton kernels of `token_kl`, one program a row.

The forward reads both sides once; the backward reads both and writes once. Arithmetic is float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.ops.backends import contiguous, gradient_rows, new_rows, padded_width, unit_columns
from fastalign.ops.token_kl.reference import Inputs
from fastalign.ops.triton_softmax import (
    bounded,
    divergence,
    load_columns,
    pair_sums,
    row_transform,
    store_columns,
    u_of,
)
from fastalign.ops.triton_table import launch_options


@triton.jit
def token_kl_fwd_kernel(
    logits_ptr,
    reference_ptr,
    temperature_ptr,
    ignored_ptr,
    kl_ptr,
    maximum_ptr,
    log_total_ptr,
    reference_maximum_ptr,
    reference_log_total_ptr,
    row_stride,
    reference_stride,
    num_columns,
    num_padded,
    softcap,
    OVER_REFERENCE: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reduce one row of each side to the statistics of `add_pair`, online."""
    row = tl.program_id(0).to(tl.int64)
    cap_scale, gain, _slope = row_transform(
        row, temperature_ptr, softcap, 1.0, HAS_TEMPERATURE, HAS_SOFTCAP
    )
    logits_ptr += row * row_stride
    reference_ptr += row * reference_stride
    columns = (num_columns, num_padded)
    m, total, _weighted, n, reference_total, cross, largest = pair_sums(
        logits_ptr, reference_ptr, columns, cap_scale, gain, OVER_REFERENCE, HAS_SOFTCAP, BLOCK
    )
    _, kl = divergence(total, reference_total, cross, largest, OVER_REFERENCE)
    if HAS_IGNORED:
        kl = tl.where(tl.load(ignored_ptr + row) == 0, kl, 0.0)
    tl.store(kl_ptr + row, kl)
    tl.store(maximum_ptr + row, m)
    tl.store(log_total_ptr + row, tl.log(total))
    tl.store(reference_maximum_ptr + row, n)
    tl.store(reference_log_total_ptr + row, tl.log(reference_total))


@triton.jit
def token_kl_bwd_kernel(
    logits_ptr,
    reference_ptr,
    temperature_ptr,
    ignored_ptr,
    kl_ptr,
    maximum_ptr,
    log_total_ptr,
    reference_maximum_ptr,
    reference_log_total_ptr,
    grad_kl_ptr,
    gradient_ptr,
    row_stride,
    reference_stride,
    gradient_stride,
    num_columns,
    num_padded,
    softcap,
    OVER_REFERENCE: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row's gradient, g p (log p - log q - KL) dz / dlogit.

    With OVER_REFERENCE it is g (p - q) dz / dlogit. An infinite KL has a NaN gradient.
    """
    row = tl.program_id(0).to(tl.int64)
    kept = True
    if HAS_IGNORED:
        kept = tl.load(ignored_ptr + row) == 0
    cap_scale, gain, slope = row_transform(
        row, temperature_ptr, softcap, 1.0, HAS_TEMPERATURE, HAS_SOFTCAP
    )
    m, log_total = tl.load(maximum_ptr + row), tl.load(log_total_ptr + row)
    n, reference_log_total = (
        tl.load(reference_maximum_ptr + row),
        tl.load(reference_log_total_ptr + row),
    )
    kl = tl.load(kl_ptr + row)
    g = tl.where(kl == float("inf"), float("nan"), tl.load(grad_kl_ptr + row)) * slope
    kl = tl.where(kl == float("inf"), 0.0, kl)
    logits_ptr += row * row_stride
    reference_ptr += row * reference_stride
    gradient_ptr += row * gradient_stride
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_columns
        x = load_columns(logits_ptr, column, (num_columns, num_padded))
        y = load_columns(reference_ptr, column, (num_columns, num_padded))
        u, v = u_of(x, cap_scale, HAS_SOFTCAP), u_of(y, cap_scale, HAS_SOFTCAP)
        # outside, a maximum far below zero would make the exponentials overflow
        log_p = tl.where(inside, (u - m) * gain - log_total, -float("inf"))
        log_q = tl.where(inside, (v - n) * gain - reference_log_total, -float("inf"))
        p = tl.exp(log_p)
        if OVER_REFERENCE:
            bracket = p - tl.exp(log_q)
        else:
            bracket = p * (bounded(log_p) - bounded(log_q) - kl)
        if HAS_SOFTCAP:
            bracket *= 1.0 - u * u
        store_columns(gradient_ptr, column, num_padded, tl.where(kept, bracket * g, 0.0))


def _operands(inputs: Inputs, unused: Tensor) -> list[Tensor]:
    """Return both sides, temperature and ignored rows; `unused` for what is None and not read."""
    temperature = contiguous(inputs.temperature, torch.float32)
    ignored = contiguous(inputs.ignored)
    return [
        unit_columns(inputs.logits),
        unit_columns(inputs.reference_logits),
        unused if temperature is None else temperature,
        unused if ignored is None else ignored.view(torch.int8),
    ]


def _options(
    kernel: str, inputs: Inputs, operands: list[Tensor], *gradient: Tensor
) -> dict[str, Any]:
    logits, reference_logits, *_ = operands
    return {
        "row_stride": logits.stride(0),
        "reference_stride": reference_logits.stride(0),
        "num_columns": logits.shape[1],
        "num_padded": padded_width(logits, reference_logits, *gradient),
        "softcap": 1.0 if inputs.softcap is None else inputs.softcap,
        "OVER_REFERENCE": inputs.over_reference,
        "HAS_TEMPERATURE": inputs.temperature is not None,
        "HAS_SOFTCAP": inputs.softcap is not None,
        "HAS_IGNORED": inputs.ignored is not None,
        **launch_options(kernel, logits.shape[1], logits.device),
    }


def forward(inputs: Inputs) -> list[Tensor]:  # each (T,) float32
    """Return the KL, and of each side the maximum of u and log sum exp(z - max z)."""
    num_rows = inputs.logits.shape[0]
    results = new_rows(5, num_rows, inputs.logits)
    if num_rows:
        operands = _operands(inputs, unused=results[0])
        options = _options("token_kl_fwd_kernel", inputs, operands)
        token_kl_fwd_kernel[(num_rows,)](*operands, *results, **options)
    return results


def backward(inputs: Inputs, *rows: Tensor) -> Tensor:  # (T, V)
    """Return the gradient of the logits, in their dtype; `rows` as in `reference.backward`."""
    logits = inputs.logits
    gradient = gradient_rows(logits, "triton")
    if logits.shape[0]:
        operands = _operands(inputs, unused=rows[0])
        options = _options("token_kl_bwd_kernel", inputs, operands, gradient)
        given = [row.contiguous() for row in rows]
        token_kl_bwd_kernel[(logits.shape[0],)](
            *operands, *given, gradient, gradient_stride=gradient.stride(0), **options
        )
    return gradient
