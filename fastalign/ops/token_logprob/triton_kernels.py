"""Triton kernels of `token_logprob`, one program a row.

The forward reads the logits once; the backward reads and writes once. Arithmetic is float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.ops.backends import contiguous, gradient_rows, new_rows, padded_width, unit_columns
from fastalign.ops.token_logprob.reference import Inputs
from fastalign.ops.triton_softmax import row_sums, row_transform, u_of, write_gradient
from fastalign.ops.triton_table import launch_options


@triton.jit
def token_logprob_fwd_kernel(
    logits_ptr,
    targets_ptr,
    temperature_ptr,
    logprob_ptr,
    entropy_ptr,
    maximum_ptr,
    log_total_ptr,
    row_stride,
    num_columns,
    num_padded,
    softcap,
    ignore_index,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reduce one row to the statistics of `row_sums`, S and U of z with a largest value of 0.

    The entropy is log S - U / S.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    cap_scale, gain, _slope = row_transform(
        row, temperature_ptr, softcap, 1.0, HAS_TEMPERATURE, HAS_SOFTCAP
    )
    logits_ptr += row * row_stride
    m, total, weighted = row_sums(
        logits_ptr, (num_columns, num_padded), cap_scale, gain, HAS_SOFTCAP, BLOCK
    )
    log_total = tl.log(total)
    ignored = target == ignore_index
    # NaN where the target is no column; where it is ignored that is discarded.
    inside = (target >= 0) & (target < num_columns)
    x = tl.load(logits_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    logprob = (u_of(x, cap_scale, HAS_SOFTCAP) - m) * gain - log_total
    entropy = log_total - weighted / total
    # Rounding may leave it slightly below zero; tl.maximum would drop a NaN.
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    tl.store(logprob_ptr + row, tl.where(ignored, 0.0, logprob))
    tl.store(entropy_ptr + row, tl.where(ignored, 0.0, entropy))
    tl.store(maximum_ptr + row, m)
    tl.store(log_total_ptr + row, log_total)


@triton.jit
def token_logprob_bwd_kernel(
    logits_ptr,
    targets_ptr,
    temperature_ptr,
    logprob_ptr,
    entropy_ptr,
    maximum_ptr,
    log_total_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    gradient_ptr,
    row_stride,
    gradient_stride,
    num_columns,
    num_padded,
    softcap,
    ignore_index,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row's gradient; p comes back from the statistics, so one read is enough."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    known = (
        tl.load(maximum_ptr + row),
        tl.load(log_total_ptr + row),
        tl.load(logprob_ptr + row),
        tl.load(entropy_ptr + row),
    )
    e = 0.0
    if HAS_GRAD_ENTROPY:
        e = tl.load(grad_entropy_ptr + row)
    inside = (target >= 0) & (target < num_columns)
    g = tl.where(inside, tl.load(grad_logprob_ptr + row), float("nan"))
    write_gradient(
        logits_ptr + row * row_stride,
        gradient_ptr + row * gradient_stride,
        (num_columns, num_padded),
        target,
        target != ignore_index,
        row_transform(row, temperature_ptr, softcap, 1.0, HAS_TEMPERATURE, HAS_SOFTCAP),
        known,
        (g, e),
        HAS_SOFTCAP,
        HAS_GRAD_ENTROPY,
        BLOCK,
    )


def _operands(inputs: Inputs, unused: Tensor) -> list[Tensor]:
    """Return logits, targets and temperature; `unused` for what is None and not read."""
    temperature = contiguous(inputs.temperature, torch.float32)
    return [
        unit_columns(inputs.logits),
        inputs.targets.contiguous(),
        unused if temperature is None else temperature,
    ]


def _options(
    kernel: str, inputs: Inputs, operands: list[Tensor], *gradient: Tensor
) -> dict[str, Any]:
    logits = operands[0]
    return {
        "row_stride": logits.stride(0),
        "num_columns": logits.shape[1],
        "num_padded": padded_width(logits, *gradient),
        "softcap": 1.0 if inputs.softcap is None else inputs.softcap,
        "ignore_index": inputs.ignore_index,
        "HAS_TEMPERATURE": inputs.temperature is not None,
        "HAS_SOFTCAP": inputs.softcap is not None,
        **launch_options(kernel, logits.shape[1], logits.device),
    }


def forward(inputs: Inputs) -> list[Tensor]:  # each (T,) float32
    """Return log-prob, entropy, maximum of u and log sum exp(z - max z)."""
    num_rows = inputs.logits.shape[0]
    results = new_rows(4, num_rows, inputs.logits)
    if num_rows:
        operands = _operands(inputs, unused=results[0])
        options = _options("token_logprob_fwd_kernel", inputs, operands)
        token_logprob_fwd_kernel[(num_rows,)](*operands, *results, **options)
    return results


def backward(inputs: Inputs, *rows: Tensor | None) -> Tensor:  # (T, V)
    """Return the gradient of the logits, in their dtype; `rows` as in `reference.backward`."""
    logits = inputs.logits
    gradient = gradient_rows(logits, "triton")
    if logits.shape[0]:
        *given, grad_entropy = map(contiguous, rows)
        unused = rows[0]
        assert unused is not None
        operands = _operands(inputs, unused)
        token_logprob_bwd_kernel[(logits.shape[0],)](
            *operands,
            *given,
            unused if grad_entropy is None else grad_entropy,
            gradient,
            gradient_stride=gradient.stride(0),
            HAS_GRAD_ENTROPY=grad_entropy is not None,
            **_options("token_logprob_bwd_kernel", inputs, operands, gradient),
        )
    return gradient
