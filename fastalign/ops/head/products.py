"""Matrix products of a head: their dtype and library; accumulated in float32.

Legend: C rows, V vocabulary, D hidden.
"""

import ctypes
import os

import torch
from torch import Tensor

from fastalign.ops import native_library


def accumulation_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, statistics and the weight's gradient: float32 or float64."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_native_product(device_type: str) -> bool:
    """Return True where our own bfloat16 product runs: the CPU has it, the library is built."""
    if device_type != "cpu" or native_library.unusable_reason("cpu") is not None:
        return False
    if os.environ.get("FASTALIGN_CPU_ISA", "best") not in ("best", "avx512"):
        return False
    return bool(native_library.load("cpu").fastalign_product_bf16_usable_cpu())


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


def operand(value: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Return `value` rounded to `compute_dtype`, in the dtype of its products on this device."""
    return value.to(compute_dtype).to(product_dtype(compute_dtype, value.device.type))


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write left @ right into `out`, accumulated and returned in `out`'s dtype."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        _native_product(left, right, out, accumulate=False)


def add_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Add left @ right to `out`, accumulated in `out`'s dtype."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        _native_product(left, right, out, accumulate=True)


def _with_a_unit_stride(matrix: Tensor) -> Tensor:
    return matrix if 1 in matrix.stride() else matrix.contiguous()


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
