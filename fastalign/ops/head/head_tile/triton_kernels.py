"""The pass over a tile in Triton, one program a row: two readings, the second from the cache.

Arithmetic is float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.ops.head.head_tile.transform import HeadTransform, RowStatistics
from fastalign.ops.triton_softmax import add_block, tanh
from fastalign.ops.triton_table import launch_options


@triton.jit
def u_of(x, cap_scale, HAS_SOFTCAP: tl.constexpr):
    """The tanh of a softcap, or the product itself."""
    if HAS_SOFTCAP:
        x = tanh(x * cap_scale)
    return x


@triton.jit
def row_sums(
    x_ptr,
    num_columns,
    cap_scale,
    gain,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The maximum of u, and of z less its own the sums of exp(z) and of z exp(z).

    Of u, because the target's less it is then exactly 0 where it is the maximum.
    """
    m = -float("inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_columns
        x = tl.load(x_ptr + column, mask=inside, other=-float("inf"))
        u = tl.where(inside, u_of(x, cap_scale, HAS_SOFTCAP), -float("inf"))
        m, total, weighted = add_block(m, total, weighted, u, gain)
    return m, total, weighted


@triton.jit
def one_less_p(logprob):
    """1 - p, by its series where p is near 1."""
    series = 1.0 + logprob * (0.5 + logprob * (0.16666667 + logprob * 0.041666667))
    return tl.where(logprob > -0.01, -logprob * series, 1.0 - tl.exp(logprob))


@triton.jit
def write_gradient(
    x_ptr,
    gradient_ptr,
    num_columns,
    target,
    kept,
    transform,
    known,
    upstream,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's slope [g (1[v = y] - p) - e p (log p + H)] over its columns.

    `transform` and `known` are tuples; known[0] is the maximum of u.
    """
    tl.debug_barrier()  # every thread has read the target before any overwrites it
    cap_scale, gain, slope = transform
    m, log_total, logprob, entropy = known
    g, e = upstream
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_columns
        u = u_of(tl.load(x_ptr + column, mask=inside, other=0.0), cap_scale, HAS_SOFTCAP)
        log_p = (u - m) * gain - log_total
        p = tl.exp(log_p)
        result = g * tl.where(column == target, one_less_p(logprob), -p)
        if HAS_GRAD_ENTROPY:
            result -= e * p * (tl.where(log_p < -1e30, -1e30, log_p) + entropy)
        if HAS_SOFTCAP:
            result *= 1.0 - u * u
        result = tl.where(kept, result * slope, 0.0).to(gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + column, result, mask=inside)


@triton.jit
def row_transform(
    row,
    temperature_ptr,
    softcap,
    logit_scale,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """cap_scale, gain and slope: u = tanh(cap_scale x) or x, z = gain u, dz / dx by u."""
    slope, cap_scale = logit_scale, logit_scale / softcap
    if HAS_TEMPERATURE:
        slope = slope / tl.load(temperature_ptr + row)
    gain = slope
    if HAS_SOFTCAP:
        gain = slope / cap_scale
    return cap_scale, gain, slope


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
    softcap,
    logit_scale,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HAS_GRAD_LOGPROB: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its statistics, then slope [g (1[v = y] - p) - e p (log p + H)] over its columns."""
    row = tl.program_id(0).to(tl.int64)
    kept = tl.load(ignored_ptr + row) == 0
    cap_scale, gain, slope = row_transform(
        row, temperature_ptr, softcap, logit_scale, HAS_TEMPERATURE, HAS_SOFTCAP
    )
    x_ptr += row * row_stride
    m, total, weighted = row_sums(x_ptr, num_columns, cap_scale, gain, HAS_SOFTCAP, BLOCK)
    log_total = tl.log(total)
    entropy = log_total - weighted / total
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    target = tl.load(targets_ptr + row)
    shifted = (u_of(tl.load(x_ptr + target), cap_scale, HAS_SOFTCAP) - m) * gain
    logprob = shifted - log_total
    tl.store(logprob_ptr + row, tl.where(kept, logprob, 0.0))
    tl.store(entropy_ptr + row, tl.where(kept, entropy, 0.0))
    tl.store(is_argmax_ptr + row, (kept & (shifted >= 0.0)).to(tl.int8))
    if HAS_GRADIENT:
        g, e = 1.0, 0.0
        if HAS_GRAD_LOGPROB:
            g = tl.load(grad_logprob_ptr + row)
        if HAS_GRAD_ENTROPY:
            e = tl.load(grad_entropy_ptr + row)
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


def rows_of(value: Tensor | None, num_rows: int, unused: Tensor) -> Tensor:
    """The values as float32, one for each row; any tensor where there are none."""
    return unused if value is None else value.to(torch.float32).expand(num_rows).contiguous()


def read(
    tile: Tensor,
    targets: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    gradient: Tensor | None,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    with_entropy: bool,
) -> RowStatistics:
    """See `head_tile.read_tile`."""
    num_rows, num_columns = tile.shape
    found = RowStatistics.empty(num_rows, tile.device)
    if num_rows == 0:
        return found
    rows = (transform.temperature, grad_logprob, grad_entropy)
    head_tile_kernel[(num_rows,)](
        tile,
        targets.contiguous(),
        ignored.contiguous().view(torch.int8),
        *(rows_of(value, num_rows, found.logprob) for value in rows),
        found.logprob,
        found.entropy,
        found.is_argmax.view(torch.int8),
        tile if gradient is None else gradient,
        row_stride=tile.stride(0),
        gradient_stride=0 if gradient is None else gradient.stride(0),
        num_columns=num_columns,
        softcap=1.0 if transform.softcap is None else transform.softcap,
        logit_scale=transform.logit_scale,
        HAS_TEMPERATURE=transform.temperature is not None,
        HAS_SOFTCAP=transform.softcap is not None,
        HAS_GRADIENT=gradient is not None,
        HAS_GRAD_LOGPROB=grad_logprob is not None,
        HAS_GRAD_ENTROPY=grad_entropy is not None,
        **launch_options("head_tile_kernel", num_columns, tile.device),
    )
    return found
