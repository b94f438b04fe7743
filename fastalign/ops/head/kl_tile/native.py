"""Launcher of the C++ and CUDA passes over two tiles, behind the C ABI of `csrc/abi.h`."""

import ctypes

from torch import Tensor

from fastalign.ops.head.head_tile import HeadTransform
from fastalign.ops.head.head_tile.native import rows_of
from fastalign.ops.head.kl_tile.statistics import PairStatistics, Upstream
from fastalign.ops.native_library import DTYPE_CODES, address, call


def read(
    tiles: Tensor,
    targets: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    over_reference: bool,
    brackets: Tensor | None,
    gradient: Tensor | None,
    upstream: Upstream | None,
) -> PairStatistics:
    """See `kl_tile.read_pair`."""
    _, num_rows, num_columns = tiles.shape
    found = PairStatistics.empty(num_rows, tiles)
    temperature = rows_of(transform.temperature, num_rows)
    targets, ignored = targets.contiguous(), ignored.contiguous()
    rows = [rows_of(value, num_rows) for value in upstream or (None, None, None)]
    first, second = (gradient, None) if brackets is None else (brackets[0], brackets[1])
    call(
        "kl_tile",
        tiles.device,
        [
            *(address(tile) for tile in tiles),
            *(ctypes.c_int64(size) for size in (num_rows, num_columns, tiles.stride(1))),
            ctypes.c_float(transform.softcap or 0.0),
            ctypes.c_float(transform.logit_scale),
            ctypes.c_int32(over_reference),
            *(address(value) for value in (temperature, targets, ignored, *found, first, second)),
            ctypes.c_int32(0 if first is None else DTYPE_CODES[first.dtype]),
            ctypes.c_int64(0 if first is None else first.stride(0)),
            *(address(value) for value in rows),
        ],
    )
    return found
