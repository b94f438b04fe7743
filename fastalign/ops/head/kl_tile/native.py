"""Launcher of the C++ and CUDA passes over two tiles, behind the C ABI of `csrc/abi.h`."""

import ctypes

from torch import Tensor

from fastalign.ops.head.head_tile import Tile
from fastalign.ops.head.head_tile.native import TileArguments, gradient_arguments, rows_of
from fastalign.ops.head.kl_tile.statistics import PairStatistics, PairUpstream
from fastalign.ops.native_library import address, call


def read(
    tile: Tile,
    over_reference: bool,
    brackets: Tensor | None,
    gradient: Tensor | None,
    upstream: PairUpstream | None,
) -> PairStatistics:
    """See `kl_tile.read_pair`."""
    num_rows = tile.products.shape[1]
    found = PairStatistics.empty(num_rows, tile.products)
    arguments = TileArguments(tile)
    grads = [rows_of(value, num_rows) for value in upstream or (None, None, None)]
    first, second = (gradient, None) if brackets is None else (brackets[0], brackets[1])
    call(
        "kl_tile",
        tile.products.device,
        [
            *(address(products) for products in tile.products),
            *arguments.sizes,
            ctypes.c_int32(over_reference),
            *arguments.rows,
            *(address(value) for value in (*found, first, second)),
            *gradient_arguments(first),
            *(address(value) for value in grads),
        ],
    )
    return found
