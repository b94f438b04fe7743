"""The split passes over a tile in Triton, one program a row. Arithmetic is float32."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.ops.head.head_tile.transform import HeadTransform, SoftmaxStatistics, TileStatistics
from fastalign.ops.head.head_tile.triton_kernels import (
    row_sums,
    row_transform,
    rows_of,
    u_of,
    write_gradient,
)
from fastalign.ops.triton_table import launch_options


@triton.jit
def head_tile_statistics_kernel(
    x_ptr,
    targets_ptr,
    ignored_ptr,
    temperature_ptr,
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    target_ptr,
    row_stride,
    num_columns,
    softcap,
    logit_scale,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's statistics over these columns."""
    row = tl.program_id(0).to(tl.int64)
    kept = tl.load(ignored_ptr + row) == 0
    cap_scale, gain, _slope = row_transform(
        row, temperature_ptr, softcap, logit_scale, HAS_TEMPERATURE, HAS_SOFTCAP
    )
    x_ptr += row * row_stride
    m, total, weighted = row_sums(x_ptr, num_columns, cap_scale, gain, HAS_SOFTCAP, BLOCK)
    target = tl.load(targets_ptr + row)
    inside = kept & (target >= 0) & (target < num_columns)
    x = tl.load(x_ptr + target, mask=inside, other=0.0)
    tl.store(maximum_ptr + row, tl.where(kept, m, 0.0))
    tl.store(total_ptr + row, tl.where(kept, total, 0.0))
    if HAS_WEIGHTED:
        tl.store(weighted_ptr + row, tl.where(kept, weighted, 0.0))
    tl.store(target_ptr + row, tl.where(inside, u_of(x, cap_scale, HAS_SOFTCAP), 0.0))


@triton.jit
def head_tile_gradient_kernel(
    x_ptr,
    targets_ptr,
    ignored_ptr,
    temperature_ptr,
    maximum_ptr,
    log_total_ptr,
    entropy_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    gradient_ptr,
    row_stride,
    gradient_stride,
    num_columns,
    softcap,
    logit_scale,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_LOGPROB: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's gradient by these columns, given its softmax over all."""
    row = tl.program_id(0).to(tl.int64)
    kept = tl.load(ignored_ptr + row) == 0
    cap_scale, gain, slope = row_transform(
        row, temperature_ptr, softcap, logit_scale, HAS_TEMPERATURE, HAS_SOFTCAP
    )
    x_ptr += row * row_stride
    m = tl.load(maximum_ptr + row)
    log_total = tl.load(log_total_ptr + row)
    g, e, entropy = 1.0, 0.0, 0.0
    if HAS_GRAD_LOGPROB:
        g = tl.load(grad_logprob_ptr + row)
    if HAS_GRAD_ENTROPY:
        e = tl.load(grad_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < num_columns)
    x = tl.load(x_ptr + target, mask=inside, other=0.0)
    logprob = (u_of(x, cap_scale, HAS_SOFTCAP) - m) * gain - log_total
    write_gradient(
        x_ptr,
        gradient_ptr + row * gradient_stride,
        num_columns,
        target,
        kept,
        (cap_scale, gain, slope),
        (m, log_total, logprob, entropy),
        (g, e),
        HAS_SOFTCAP,
        HAS_GRAD_ENTROPY,
        BLOCK,
    )


def _launch(kernel: str, tile: Tensor, transform: HeadTransform) -> dict[str, Any]:
    """The arguments that both kernels end with."""
    return {
        "row_stride": tile.stride(0),
        "num_columns": tile.shape[1],
        "softcap": 1.0 if transform.softcap is None else transform.softcap,
        "logit_scale": transform.logit_scale,
        "HAS_TEMPERATURE": transform.temperature is not None,
        "HAS_SOFTCAP": transform.softcap is not None,
        **launch_options(kernel, tile.shape[1], tile.device),
    }


def statistics(
    tile: Tensor, targets: Tensor, ignored: Tensor, transform: HeadTransform, with_entropy: bool
) -> TileStatistics:
    """See `head_tile_statistics`."""
    num_rows = tile.shape[0]
    found = TileStatistics.empty(num_rows, tile.device, with_entropy)
    if num_rows == 0:
        return found
    head_tile_statistics_kernel[(num_rows,)](
        tile,
        targets.contiguous(),
        ignored.contiguous().view(torch.int8),
        rows_of(transform.temperature, num_rows, found.total),
        found.maximum,
        found.total,
        found.total if found.weighted is None else found.weighted,
        found.target,
        HAS_WEIGHTED=with_entropy,
        **_launch("head_tile_statistics_kernel", tile, transform),
    )
    return found


def gradient(
    tile: Tensor,
    targets: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    known: SoftmaxStatistics,
    gradient: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """See `head_tile_gradient`."""
    num_rows = tile.shape[0]
    if num_rows == 0:
        return
    head_tile_gradient_kernel[(num_rows,)](
        tile,
        targets.contiguous(),
        ignored.contiguous().view(torch.int8),
        rows_of(transform.temperature, num_rows, tile),
        *(value.contiguous() for value in (known.maximum, known.log_total, known.entropy)),
        *(rows_of(value, num_rows, tile) for value in (grad_logprob, grad_entropy)),
        gradient,
        gradient_stride=gradient.stride(0),
        HAS_GRAD_LOGPROB=grad_logprob is not None,
        HAS_GRAD_ENTROPY=grad_entropy is not None,
        **_launch("head_tile_gradient_kernel", tile, transform),
    )
