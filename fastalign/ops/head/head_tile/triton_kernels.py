"""The passes over a tile in Triton, one program a row, in float32.

The whole pass reads a row twice, the second time from the cache.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.ops.backends import padded_width
from fastalign.ops.head.head_tile.tile import (
    HeadTransform,
    RowStatistics,
    SoftmaxStatistics,
    Tile,
    TileStatistics,
    Upstream,
)
from fastalign.ops.triton_softmax import row_sums, row_transform, u_of, write_gradient
from fastalign.ops.triton_table import launch_options


@triton.jit
def head_tile_kernel(
    x_ptr,
    targets_ptr,
    ignored_ptr,
    temperature_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    logprob_ptr,
    entropy_ptr,
    is_argmax_ptr,
    gradient_ptr,
    row_stride,
    gradient_stride,
    num_columns,
    num_padded,
    softcap,
    logit_scale,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HAS_GRAD_LOGPROB: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row's statistics, then its gradient over its columns: see `write_gradient`."""
    row = tl.program_id(0).to(tl.int64)
    is_target = tl.load(ignored_ptr + row) == 0
    cap_scale, gain, slope = row_transform(
        row, temperature_ptr, softcap, logit_scale, HAS_TEMPERATURE, HAS_SOFTCAP
    )
    x_ptr += row * row_stride
    m, total, weighted = row_sums(
        x_ptr, (num_columns, num_padded), cap_scale, gain, HAS_SOFTCAP, BLOCK
    )
    log_total = tl.log(total)
    entropy = log_total - weighted / total
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < num_columns)
    x = tl.load(x_ptr + target, mask=inside, other=float("nan"))
    shifted = (u_of(x, cap_scale, HAS_SOFTCAP) - m) * gain
    logprob = shifted - log_total
    tl.store(logprob_ptr + row, tl.where(is_target, logprob, 0.0))
    tl.store(entropy_ptr + row, tl.where(is_target, entropy, 0.0))
    tl.store(is_argmax_ptr + row, (is_target & (shifted >= 0.0)).to(tl.int8))
    if HAS_GRADIENT:
        g, e = 1.0, 0.0
        if HAS_GRAD_LOGPROB:
            g = tl.load(grad_logprob_ptr + row)
        if HAS_GRAD_ENTROPY:
            e = tl.load(grad_entropy_ptr + row)
        g = tl.where(inside, g, float("nan"))
        write_gradient(
            x_ptr,
            gradient_ptr + row * gradient_stride,
            (num_columns, num_padded),
            target,
            is_target,
            (cap_scale, gain, slope),
            (m, log_total, logprob, entropy),
            (g, e),
            HAS_SOFTCAP,
            HAS_GRAD_ENTROPY,
            BLOCK,
        )


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
    num_padded,
    softcap,
    logit_scale,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row's statistics over these columns."""
    row = tl.program_id(0).to(tl.int64)
    is_target = tl.load(ignored_ptr + row) == 0
    cap_scale, gain, _slope = row_transform(
        row, temperature_ptr, softcap, logit_scale, HAS_TEMPERATURE, HAS_SOFTCAP
    )
    x_ptr += row * row_stride
    m, total, weighted = row_sums(
        x_ptr, (num_columns, num_padded), cap_scale, gain, HAS_SOFTCAP, BLOCK
    )
    target = tl.load(targets_ptr + row)
    inside = is_target & (target >= 0) & (target < num_columns)
    x = tl.load(x_ptr + target, mask=inside, other=0.0)
    tl.store(maximum_ptr + row, tl.where(is_target, m, 0.0))
    tl.store(total_ptr + row, tl.where(is_target, total, 0.0))
    if HAS_WEIGHTED:
        tl.store(weighted_ptr + row, tl.where(is_target, weighted, 0.0))
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
    num_padded,
    softcap,
    logit_scale,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_LOGPROB: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row's gradient by these columns, given its softmax over all."""
    row = tl.program_id(0).to(tl.int64)
    is_target = tl.load(ignored_ptr + row) == 0
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
        (num_columns, num_padded),
        target,
        is_target,
        (cap_scale, gain, slope),
        (m, log_total, logprob, entropy),
        (g, e),
        HAS_SOFTCAP,
        HAS_GRAD_ENTROPY,
        BLOCK,
    )


def rows_of(value: Tensor | None, num_rows: int, unused: Tensor) -> Tensor:
    """Return the values as float32, one for each row; any tensor where there are none."""
    return unused if value is None else value.to(torch.float32).expand(num_rows).contiguous()


def transform_arguments(transform: HeadTransform) -> dict[str, Any]:
    """Return the arguments that describe a transform, beside its temperature."""
    return {
        # any number: unused without HAS_SOFTCAP
        "softcap": 1.0 if transform.softcap is None else transform.softcap,
        "logit_scale": transform.logit_scale,
        "HAS_TEMPERATURE": transform.temperature is not None,
        "HAS_SOFTCAP": transform.softcap is not None,
    }


def launch_arguments(kernel: str, tile: Tile, gradient: Tensor | None = None) -> dict[str, Any]:
    """Return the arguments that every kernel ends with."""
    products = tile.products
    return {
        "row_stride": products.stride(-2),
        "num_columns": products.shape[-1],
        "num_padded": padded_width(products, *(() if gradient is None else (gradient,))),
        **transform_arguments(tile.transform),
        **launch_options(kernel, products.shape[-1], products.device),
    }


def read(
    tile: Tile, gradient: Tensor | None, upstream: Upstream, with_entropy: bool
) -> RowStatistics:
    """See `head_tile.read_tile`; entropies are always computed."""
    products = tile.products
    num_rows = products.shape[0]
    found = RowStatistics.empty(num_rows, products.device)
    if num_rows == 0:
        return found
    rows = (tile.transform.temperature, *upstream)
    head_tile_kernel[(num_rows,)](
        products,
        tile.targets.contiguous(),
        tile.ignored.contiguous().view(torch.int8),
        *(rows_of(value, num_rows, found.logprob) for value in rows),
        found.logprob,
        found.entropy,
        found.is_argmax.view(torch.int8),
        products if gradient is None else gradient,
        gradient_stride=0 if gradient is None else gradient.stride(0),
        HAS_GRADIENT=gradient is not None,
        HAS_GRAD_LOGPROB=upstream.logprob is not None,
        HAS_GRAD_ENTROPY=upstream.entropy is not None,
        **launch_arguments("head_tile_kernel", tile, gradient),
    )
    return found


def statistics(tile: Tile, with_entropy: bool) -> TileStatistics:
    """See `head_tile.head_tile_statistics`."""
    num_rows = tile.products.shape[0]
    found = TileStatistics.empty(num_rows, tile.products.device, with_entropy)
    if num_rows == 0:
        return found
    head_tile_statistics_kernel[(num_rows,)](
        tile.products,
        tile.targets.contiguous(),
        tile.ignored.contiguous().view(torch.int8),
        rows_of(tile.transform.temperature, num_rows, found.total),
        found.maximum,
        found.total,
        found.total if found.weighted is None else found.weighted,
        found.target,
        HAS_WEIGHTED=with_entropy,
        **launch_arguments("head_tile_statistics_kernel", tile),
    )
    return found


def gradient(tile: Tile, known: SoftmaxStatistics, gradient: Tensor, upstream: Upstream) -> None:
    """See `head_tile.head_tile_gradient`."""
    products = tile.products
    num_rows = products.shape[0]
    if num_rows == 0:
        return
    head_tile_gradient_kernel[(num_rows,)](
        products,
        tile.targets.contiguous(),
        tile.ignored.contiguous().view(torch.int8),
        rows_of(tile.transform.temperature, num_rows, products),
        *(value.contiguous() for value in known),
        *(rows_of(value, num_rows, products) for value in upstream),
        gradient,
        gradient_stride=gradient.stride(0),
        HAS_GRAD_LOGPROB=upstream.logprob is not None,
        HAS_GRAD_ENTROPY=upstream.entropy is not None,
        **launch_arguments("head_tile_gradient_kernel", tile, gradient),
    )
