"""Triton kernels of `token_kl`, one program a row.

The forward reads both sides once; the backward reads both and writes once. Arithmetic is float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.ops.backends import contiguous, new_rows, unit_columns
from fastalign.ops.token_kl.reference import Inputs
from fastalign.ops.triton_softmax import add_pair, bounded, divergence, tanh, transform
from fastalign.ops.triton_table import launch_options


@triton.jit
def token_kl_fwd_kernel(
    logits_ptr,
    reference_ptr,
    temperature_ptr,
    ignored_ptr,
    kl_ptr,
    logsumexp_ptr,
    reference_logsumexp_ptr,
    row_stride,
    reference_stride,
    num_columns,
    softcap,
    OVER_REFERENCE: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reduce one row of each side to the statistics of `add_pair`, online."""
    row = tl.program_id(0).to(tl.int64)
    scale = 1.0
    if HAS_TEMPERATURE:
        scale = 1.0 / tl.load(temperature_ptr + row)
    logits_ptr += row * row_stride
    reference_ptr += row * reference_stride
    lowest = -float("inf")
    m, total, weighted = lowest, 0.0, 0.0
    n, reference_total, cross, largest = lowest, 0.0, 0.0, lowest
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_columns
        x = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(reference_ptr + column, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(inside, transform(x, softcap, scale, HAS_SOFTCAP), lowest)
        r = tl.where(inside, transform(y, softcap, scale, HAS_SOFTCAP), lowest)
        m, total, weighted, n, reference_total, cross, largest = add_pair(
            m, total, weighted, n, reference_total, cross, largest, z, r, OVER_REFERENCE
        )
    _, kl = divergence(total, reference_total, cross, largest, OVER_REFERENCE)
    if HAS_IGNORED:
        kl = tl.where(tl.load(ignored_ptr + row) == 0, kl, 0.0)
    tl.store(kl_ptr + row, kl)
    tl.store(logsumexp_ptr + row, m + tl.log(total))
    tl.store(reference_logsumexp_ptr + row, n + tl.log(reference_total))


@triton.jit
def token_kl_bwd_kernel(
    logits_ptr,
    reference_ptr,
    temperature_ptr,
    ignored_ptr,
    kl_ptr,
    logsumexp_ptr,
    reference_logsumexp_ptr,
    grad_kl_ptr,
    gradient_ptr,
    row_stride,
    reference_stride,
    num_columns,
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
    scale = 1.0
    if HAS_TEMPERATURE:
        scale = 1.0 / tl.load(temperature_ptr + row)
    logsumexp = tl.load(logsumexp_ptr + row)
    reference_logsumexp = tl.load(reference_logsumexp_ptr + row)
    kl = tl.load(kl_ptr + row)
    g = tl.where(kl == float("inf"), float("nan"), tl.load(grad_kl_ptr + row))
    kl = tl.where(kl == float("inf"), 0.0, kl)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_columns
        x = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(reference_ptr + row * reference_stride + column, mask=inside, other=0.0)
        slope = scale
        if HAS_SOFTCAP:
            t = tanh(x / softcap)
            x = softcap * t
            slope = scale * (1.0 - t * t)
        log_p = x * scale - logsumexp
        log_q = transform(y.to(tl.float32), softcap, scale, HAS_SOFTCAP) - reference_logsumexp
        p = tl.exp(log_p)
        if OVER_REFERENCE:
            bracket = p - tl.exp(log_q)
        else:
            bracket = p * (bounded(log_p) - bounded(log_q) - kl)
        gradient = tl.where(kept, bracket * (g * slope), 0.0)
        place = gradient_ptr + row * num_columns + column
        tl.store(place, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


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


def _options(kernel: str, inputs: Inputs, operands: list[Tensor]) -> dict[str, Any]:
    logits, reference_logits, *_ = operands
    return {
        "row_stride": logits.stride(0),
        "reference_stride": reference_logits.stride(0),
        "num_columns": logits.shape[1],
        "softcap": 1.0 if inputs.softcap is None else inputs.softcap,
        "OVER_REFERENCE": inputs.over_reference,
        "HAS_TEMPERATURE": inputs.temperature is not None,
        "HAS_SOFTCAP": inputs.softcap is not None,
        "HAS_IGNORED": inputs.ignored is not None,
        **launch_options(kernel, logits.shape[1], logits.device),
    }


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:  # each (T,) float32
    """Return the KL and the two log-sum-exps."""
    num_rows = inputs.logits.shape[0]
    kl, logsumexp, reference_logsumexp = new_rows(3, num_rows, inputs.logits)
    if num_rows:
        operands = _operands(inputs, unused=kl)
        token_kl_fwd_kernel[(num_rows,)](
            *operands,
            kl,
            logsumexp,
            reference_logsumexp,
            **_options("token_kl_fwd_kernel", inputs, operands),
        )
    return kl, logsumexp, reference_logsumexp


def backward(
    inputs: Inputs,
    kl: Tensor,  # (T,)
    logsumexp: Tensor,  # (T,)
    reference_logsumexp: Tensor,  # (T,)
    grad_kl: Tensor,  # (T,)
) -> Tensor:  # (T, V)
    """Return the gradient of the logits, in their dtype."""
    logits = inputs.logits
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.shape[0]:
        operands = _operands(inputs, unused=kl)
        token_kl_bwd_kernel[(logits.shape[0],)](
            *operands,
            kl,
            logsumexp,
            reference_logsumexp,
            grad_kl.contiguous(),
            gradient,
            **_options("token_kl_bwd_kernel", inputs, operands),
        )
    return gradient
