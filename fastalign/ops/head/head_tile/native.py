"""Launchers of the C++ and CUDA passes over a tile, behind the C ABI of `csrc/abi.h`."""

import ctypes

import torch
from torch import Tensor

from fastalign.ops.head.head_tile.tile import (
    RowStatistics,
    SoftmaxStatistics,
    Tile,
    TileStatistics,
    Upstream,
)
from fastalign.ops.native_library import DTYPE_CODES, Argument, address, call


def rows_of(value: Tensor | None, num_rows: int) -> Tensor | None:
    """Return the values as float32, one for each row."""
    if value is None:
        return None
    return value.to(torch.float32).expand(num_rows).contiguous()


class TileArguments:
    """Arguments that every pass begins with.

    The tensors that the addresses point at must outlive the call, so this object holds them.
    """

    def __init__(self, tile: Tile) -> None:
        num_rows, num_columns = tile.products.shape[-2:]
        self._temperature = rows_of(tile.transform.temperature, num_rows)
        self._targets, self._ignored = tile.targets.contiguous(), tile.ignored.contiguous()
        sizes = (num_rows, num_columns, tile.products.stride(-2))
        self.sizes: list[Argument] = [
            *(ctypes.c_int64(size) for size in sizes),
            ctypes.c_float(tile.transform.softcap or 0.0),
            ctypes.c_float(tile.transform.logit_scale),
        ]
        rows = (self._temperature, self._targets, self._ignored)
        self.rows: list[Argument] = [address(value) for value in rows]
        self.all: list[Argument] = [address(tile.products), *self.sizes, *self.rows]


def gradient_arguments(gradient: Tensor | None) -> list[Argument]:
    """Return the dtype code and the row stride of a gradient that is to be written."""
    return [
        ctypes.c_int32(0 if gradient is None else DTYPE_CODES[gradient.dtype]),
        ctypes.c_int64(0 if gradient is None else gradient.stride(0)),
    ]


def read(
    tile: Tile, gradient: Tensor | None, upstream: Upstream, with_entropy: bool
) -> RowStatistics:
    """See `head_tile.read_tile`."""
    num_rows, device = tile.products.shape[0], tile.products.device
    found = RowStatistics.empty(num_rows, device)
    arguments = TileArguments(tile)
    grads = [rows_of(value, num_rows) for value in upstream]
    entropy = found.entropy if with_entropy else None
    call(
        "head_tile",
        device,
        [
            *arguments.all,
            *(address(value) for value in (found.logprob, entropy, found.is_argmax, gradient)),
            *gradient_arguments(gradient),
            *(address(value) for value in grads),
        ],
    )
    return found


def statistics(tile: Tile, with_entropy: bool) -> TileStatistics:
    """See `head_tile.head_tile_statistics`."""
    num_rows, device = tile.products.shape[0], tile.products.device
    found = TileStatistics.empty(num_rows, device, with_entropy)
    arguments = TileArguments(tile)
    results = (found.maximum, found.total, found.weighted, found.target)
    call(
        "head_tile_statistics",
        device,
        [*arguments.all, *(address(result) for result in results)],
    )
    return found


def gradient(tile: Tile, known: SoftmaxStatistics, gradient: Tensor, upstream: Upstream) -> None:
    """See `head_tile.head_tile_gradient`."""
    num_rows = tile.products.shape[0]
    arguments = TileArguments(tile)
    rows = [value.contiguous() for value in known]
    grads = [rows_of(value, num_rows) for value in upstream]
    call(
        "head_tile_gradient",
        tile.products.device,
        [
            *arguments.all,
            *(address(value) for value in (*rows, gradient)),
            *gradient_arguments(gradient),
            *(address(value) for value in grads),
        ],
    )
