"""Matrix products of a head: their dtype and library; accumulated in float32.

Legend: C rows, V vocabulary, D hidden.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops import native_library
from fastalign.ops.float32_products import onednn_product, onednn_takes

# Elements of an output that is computed in float32, a strip at a time, and rounded: a strip stays
# in a CPU's cache, and a GPU wants few launches.
STRIP_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
MIN_STRIP_ROWS = 2048  # each strip packs the other operand again
# Those of a part of an output that oneDNN returns, and is copied, and its fewest rows or columns.
ONEDNN_ELEMENTS, MIN_ONEDNN_LINES = 2**19, 256
# A GPU's library computes an output of fewer elements in several parts along the summed dimension,
# which it may add up in bfloat16.
MIN_ROUNDED_OUTPUT = 2**24


def accumulation_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, statistics and the weight's gradient: float32 or float64."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


@native_library.constant_in_graphs
def _has_native_product(device_type: str) -> bool:
    """Return True where our own bfloat16 product runs: the CPU has it, the library is built."""
    if device_type != "cpu" or native_library.unusable_reason("cpu") is not None:
        return False
    if os.environ.get("FASTALIGN_CPU_ISA", "best") not in ("best", "avx512"):
        return False
    return native_library.has_bfloat16_products()


def product_dtype(compute_dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return the dtype of the products' operands, already rounded to `compute_dtype`.

    bfloat16 stays bfloat16 where a product can accumulate and *return* float32 (CUDA, and CPUs with
    AVX-512's bfloat16 instructions): rounding logits to bfloat16 would cost about 0.45 nat per
    512-token sequence. Elsewhere the rounded operands are promoted. float16 is always promoted: a
    loss's coefficients underflow in it.
    """
    if compute_dtype in (torch.float32, torch.float64):
        return compute_dtype
    if compute_dtype == torch.bfloat16 and (
        device_type == "cuda" or _has_native_product(device_type)
    ):
        return torch.bfloat16
    return torch.float32


def operand(value: Tensor, compute_dtype: torch.dtype, low: torch.dtype | None = None) -> Tensor:
    """Return `value` rounded to `compute_dtype`, in its products' dtype: `low`, or the device's."""
    return value.to(compute_dtype).to(low or product_dtype(compute_dtype, value.device.type))


class _RoundedWeight(NamedTuple):
    weight: Tensor  # detached: it holds the storage, which then is no other weight's
    version: int
    rounded: Tensor


_ROUNDED: dict[tuple[Any, ...], _RoundedWeight] = {}
_OPEN = 0


@contextmanager
def weights_rounded_once() -> Iterator[None]:
    """Keep a head's weight in the products' dtype, for the calls inside; the weight may not change.

    A float32 weight is otherwise rounded by each call. A change that PyTorch counts (any operation
    in place) is noticed; one behind its back, as through `.data`, is not.
    """
    global _OPEN
    _OPEN += 1
    try:
        yield
    finally:
        _OPEN -= 1
        if _OPEN == 0:
            _ROUNDED.clear()


def weight_operand(
    weight: Tensor, compute_dtype: torch.dtype, low: torch.dtype | None = None
) -> Tensor:
    """Return `operand` of a weight, the same one to all calls inside of `weights_rounded_once`."""
    low = low or product_dtype(compute_dtype, weight.device.type)
    if not _OPEN or torch.compiler.is_compiling() or weight.dtype == compute_dtype == low:
        return operand(weight, compute_dtype, low)
    place = (weight.untyped_storage()._cdata, weight.storage_offset())
    key = (*place, weight.shape, weight.stride(), weight.dtype, compute_dtype, low)
    found = _ROUNDED.get(key)
    if found is None or found.version != weight._version:
        rounded = operand(weight, compute_dtype, low)
        found = _ROUNDED[key] = _RoundedWeight(weight.detach(), weight._version, rounded)
    return found.rounded


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write left @ right into `out`, accumulated and returned in `out`'s dtype."""
    if onednn_takes(left, right):
        _onednn_product(left, right, out, accumulate=False)
    elif left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        _native_product(left, right, out, accumulate=False)


def add_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Add left @ right to `out`, accumulated in `out`'s dtype."""
    if onednn_takes(left, right):
        _onednn_product(left, right, out, accumulate=True)
    elif left.dtype == out.dtype:
        out.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        _native_product(left, right, out, accumulate=True)


def strip_rows(num_columns: int, device_type: str) -> int:
    """Return the rows of a matrix that are rounded at a time."""
    elements = STRIP_ELEMENTS.get(device_type, STRIP_ELEMENTS["cuda"])
    return max(MIN_STRIP_ROWS, elements // max(num_columns, 1))


def _strips(matrix: Tensor) -> Iterator[slice]:
    """Yield spans of the rows of `matrix` that are rounded at a time."""
    rows = strip_rows(matrix.shape[1], matrix.device.type)
    for start in range(0, matrix.shape[0], rows):
        yield slice(start, min(start + rows, matrix.shape[0]))


def rounded_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write left @ right into `out`, accumulated in float32 (float64) and rounded once."""
    wide = accumulation_dtype(left.dtype)
    # a CPU whose bfloat16 products are not promoted has them in oneDNN, which adds up in float32
    in_one = left.dtype == out.dtype and (not left.is_cuda or out.numel() >= MIN_ROUNDED_OUTPUT)
    if out.dtype == wide or in_one:
        product(left, right, out)
        return
    scratch: Tensor | None = None
    for rows in _strips(out):
        part = out[rows]
        if scratch is None:
            scratch = torch.empty(part.shape, dtype=wide, device=out.device)
        sums = scratch[: part.shape[0]]
        product(left[rows], right, sums)
        part.copy_(sums)


def multiplied(matrix: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return matrix (n, k) times `scale` () in `dtype`, rounded once; destroys `matrix`.

    On a CPU a factor of one costs no pass; a GPU's is not waited for.
    """
    if scale is not None and not scale.is_cuda and bool(scale == 1):
        scale = None
    if scale is None:
        return matrix.to(dtype)
    out = matrix if matrix.dtype == dtype else torch.empty_like(matrix, dtype=dtype)
    # a matrix takes part in the promotion, a tensor () would be rounded to the other's dtype
    factor = scale.to(accumulation_dtype(matrix.dtype)).reshape(1, 1)
    if matrix.is_cuda or out.dtype == factor.dtype:
        return torch.mul(matrix, factor, out=out)
    for rows in _strips(matrix):  # a CPU converts what it multiplies in a copy
        torch.mul(matrix[rows], factor, out=out[rows])
    return out


class ProductSum:
    """Gradient of a weight (V, k) or bias (V,): a sum of products left @ right.

    A single product is rounded to the leaf's dtype at once. Several are added up in the
    accumulation dtype; the first is written, not added to zeros.

    Args:
        leaf: the tensor whose gradient it is.
        compute_dtype: dtype of the products.
        single: True if there will be one product at most.
    """

    def __init__(self, leaf: Tensor, compute_dtype: torch.dtype, *, single: bool) -> None:
        self._shape, self._leaf_dtype, self._device = leaf.shape, leaf.dtype, leaf.device
        self._single = single
        self._dtype = leaf.dtype if single else accumulation_dtype(compute_dtype)
        self._sum: Tensor | None = None

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left (V, n) @ right (n, k)."""
        if self._sum is not None:
            assert not self._single
            add_product(left, right, out=self._sum)
            return
        shape = (left.shape[0], right.shape[1])
        self._sum = torch.empty(shape, dtype=self._dtype, device=self._device)
        rounded_product(left, right, out=self._sum)

    def result(self, scale: Tensor | None = None) -> Tensor:
        """Return the sum times `scale` () in the leaf's shape and dtype; zeros of no product."""
        found, self._sum = self._sum, None
        if found is None:
            return torch.zeros(self._shape, dtype=self._leaf_dtype, device=self._device)
        return multiplied(found, scale, self._leaf_dtype).view(self._shape)


def _with_a_unit_stride(matrix: Tensor) -> Tensor:
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def _onednn_product(left: Tensor, right: Tensor, out: Tensor, *, accumulate: bool) -> None:
    # oneDNN returns a new matrix: a strip of it is in a cache when it is copied
    by_rows = out.shape[0] >= out.shape[1]
    length, other = out.shape if by_rows else (out.shape[1], out.shape[0])
    step = max(MIN_ONEDNN_LINES, ONEDNN_ELEMENTS // max(other, 1))
    for start in range(0, length, step):
        part = slice(start, start + step)
        rows, columns = (left[part], right) if by_rows else (left, right[:, part])
        to = out[part] if by_rows else out[:, part]
        (to.add_ if accumulate else to.copy_)(onednn_product(rows, columns.t()))


def _native_product(left: Tensor, right: Tensor, out: Tensor, *, accumulate: bool) -> None:
    assert (out.dtype, out.stride(1)) == (torch.float32, 1)
    left, right = _with_a_unit_stride(left), _with_a_unit_stride(right)
    arguments: list[native_library.Argument] = []
    for matrix in (left, right):
        strides = [ctypes.c_int64(stride) for stride in matrix.stride()]
        arguments += [native_library.address(matrix), *strides]
    sizes = (out.stride(0), *out.shape, left.shape[1])
    arguments += [native_library.address(out), *(ctypes.c_int64(size) for size in sizes)]
    arguments.append(ctypes.c_int32(accumulate))
    native_library.call("product_bf16", out.device, arguments)
