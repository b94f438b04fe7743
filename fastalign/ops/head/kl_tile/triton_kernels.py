"""The pass over two tiles in Triton, one program a row: two readings, the second from the cache.

Arithmetic is float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.ops.head.head_tile import Tile
from fastalign.ops.head.head_tile.triton_kernels import launch_arguments, rows_of
from fastalign.ops.head.kl_tile.statistics import PairStatistics, PairUpstream
from fastalign.ops.triton_softmax import (
    bounded,
    divergence,
    load_columns,
    one_less_p,
    pair_sums,
    row_transform,
    u_of,
)


@triton.jit
def _store(pointers, value, is_target, mask=None):
    """Store the value, or zeros where the row is ignored."""
    tl.store(pointers, tl.where(is_target, value, 0.0).to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _logprob(x, m, total, cap_scale, gain, HAS_SOFTCAP: tl.constexpr):
    """Return the log-prob of a target's product x, NaN if that is NaN."""
    return (u_of(x, cap_scale, HAS_SOFTCAP) - m) * gain - tl.log(total)


@triton.jit
def _kl_bracket(s, t, total, reference_total, mean, OVER_REFERENCE: tl.constexpr):
    """Return the policy's p, and the derivative of the KL by z."""
    scale = 1.0 / total
    exponential = tl.exp(s)
    p = exponential * scale
    if OVER_REFERENCE:
        # in this order it is exactly zero where the two sides are the same
        of_kl = (exponential - tl.exp(t) * (total / reference_total)) * scale
    else:
        of_kl = p * (s - t - mean)
    return p, of_kl


@triton.jit
def kl_tile_kernel(
    policy_ptr,
    reference_ptr,
    targets_ptr,
    ignored_ptr,
    temperature_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    grad_kl_ptr,
    logprob_ptr,
    reference_logprob_ptr,
    entropy_ptr,
    kl_ptr,
    gradient_ptr,
    kl_gradient_ptr,
    row_stride,
    gradient_stride,
    num_columns,
    num_padded,
    softcap,
    logit_scale,
    OVER_REFERENCE: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BRACKETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row's statistics, then its two brackets, or their sum weighted from upstream."""
    row = tl.program_id(0).to(tl.int64)
    is_target = tl.load(ignored_ptr + row) == 0
    cap_scale, gain, slope = row_transform(
        row, temperature_ptr, softcap, logit_scale, HAS_TEMPERATURE, HAS_SOFTCAP
    )
    policy_ptr += row * row_stride
    reference_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    # read before the reductions, whose barriers keep any warp from overwriting them first
    has_column, nan = (target >= 0) & (target < num_columns), float("nan")
    policy_x = tl.load(policy_ptr + target, mask=has_column, other=nan)
    reference_x = tl.load(reference_ptr + target, mask=has_column, other=nan)
    columns = (num_columns, num_padded)
    m, total, weighted, n, reference_total, cross, largest = pair_sums(
        policy_ptr, reference_ptr, columns, cap_scale, gain, OVER_REFERENCE, HAS_SOFTCAP, BLOCK
    )
    mean, kl = divergence(total, reference_total, cross, largest, OVER_REFERENCE)
    entropy = tl.log(total) - weighted / total
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    logprob = _logprob(policy_x, m, total, cap_scale, gain, HAS_SOFTCAP)
    reference_logprob = _logprob(reference_x, n, reference_total, cap_scale, gain, HAS_SOFTCAP)
    _store(logprob_ptr + row, logprob, is_target)
    _store(reference_logprob_ptr + row, reference_logprob, is_target)
    _store(entropy_ptr + row, entropy, is_target)
    _store(kl_ptr + row, kl, is_target)
    if HAS_GRADIENT:
        g, e, k = 1.0, 0.0, 1.0
        if not BRACKETS:
            g, e = tl.load(grad_logprob_ptr + row), tl.load(grad_entropy_ptr + row)
            k = tl.load(grad_kl_ptr + row)
        g = tl.where(has_column, g, nan)
        k = tl.where((kl == float("inf")) & (k != 0.0), nan, k)
        for start in range(0, num_columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside, stored = column < num_columns, column < num_padded
            place = row * gradient_stride + column
            u = u_of(load_columns(policy_ptr, column, columns), cap_scale, HAS_SOFTCAP)
            v = u_of(load_columns(reference_ptr, column, columns), cap_scale, HAS_SOFTCAP)
            # outside, a maximum far below zero would make the exponentials overflow
            s = tl.where(inside, bounded((u - m) * gain), -1e30)
            t = tl.where(inside, bounded((v - n) * gain), -1e30)
            p, of_kl = _kl_bracket(s, t, total, reference_total, mean, OVER_REFERENCE)
            of_logprob = tl.where(column == target, one_less_p(logprob), -p)
            by_product = slope * (1.0 - u * u) if HAS_SOFTCAP else slope
            if BRACKETS:
                result = g * of_logprob
                _store(kl_gradient_ptr + place, of_kl * k * by_product, is_target, stored)
            else:
                result = g * of_logprob + k * of_kl - e * p * (s - tl.log(total) + entropy)
            _store(gradient_ptr + place, result * by_product, is_target, stored)


def read(
    tile: Tile,
    over_reference: bool,
    brackets: Tensor | None,
    gradient: Tensor | None,
    upstream: PairUpstream | None,
) -> PairStatistics:
    """See `kl_tile.read_pair`."""
    products = tile.products
    num_rows = products.shape[1]
    found = PairStatistics.empty(num_rows, products)
    if num_rows == 0:
        return found
    # the kernel takes two gradients; without brackets it writes the first alone, or none
    written = brackets
    if written is None:
        written = products if gradient is None else gradient.expand(2, -1, -1)
    rows = (tile.transform.temperature, *(upstream or (None, None, None)))
    kl_tile_kernel[(num_rows,)](
        products[0],
        products[1],
        tile.targets.contiguous(),
        tile.ignored.contiguous().view(torch.int8),
        *(rows_of(value, num_rows, found.kl) for value in rows),
        *found,
        written[0],
        written[1],
        gradient_stride=written.stride(1),
        OVER_REFERENCE=over_reference,
        HAS_GRADIENT=brackets is not None or gradient is not None,
        BRACKETS=brackets is not None,
        **launch_arguments("kl_tile_kernel", tile, written),
    )
    return found
