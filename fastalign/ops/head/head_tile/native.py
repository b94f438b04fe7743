"""Launcher of the C++ and CUDA passes over a tile, behind the C ABI of `csrc/abi.h`."""

import ctypes

import torch
from torch import Tensor

from fastalign.ops.head.head_tile.transform import HeadTransform, RowStatistics
from fastalign.ops.native_library import DTYPE_CODES, address, call


def rows_of(value: Tensor | None, num_rows: int) -> Tensor | None:
    """The values as float32, one for each row."""
    if value is None:
        return None
    return value.to(torch.float32).expand(num_rows).contiguous()


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
    temperature = rows_of(transform.temperature, num_rows)
    targets, ignored = targets.contiguous(), ignored.contiguous()
    upstream = [rows_of(value, num_rows) for value in (grad_logprob, grad_entropy)]
    call(
        "head_tile",
        tile.device,
        [
            address(tile),
            *(ctypes.c_int64(size) for size in (num_rows, num_columns, tile.stride(0))),
            ctypes.c_float(transform.softcap or 0.0),
            ctypes.c_float(transform.logit_scale),
            *(address(value) for value in (temperature, targets, ignored, found.logprob)),
            address(found.entropy if with_entropy else None),
            *(address(value) for value in (found.is_argmax, gradient)),
            ctypes.c_int32(0 if gradient is None else DTYPE_CODES[gradient.dtype]),
            ctypes.c_int64(0 if gradient is None else gradient.stride(0)),
            *(address(value) for value in upstream),
        ],
    )
    return found
