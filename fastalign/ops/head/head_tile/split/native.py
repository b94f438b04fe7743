"""Launchers of the C++ and CUDA split passes over a tile, behind the C ABI of `csrc/abi.h`."""

import ctypes

from torch import Tensor

from fastalign.ops.head.head_tile.native import rows_of
from fastalign.ops.head.head_tile.transform import HeadTransform, SoftmaxStatistics, TileStatistics
from fastalign.ops.native_library import DTYPE_CODES, Argument, address, call


class _Tile:
    """The arguments that both passes begin with; keeps what they point at."""

    def __init__(
        self, tile: Tensor, targets: Tensor, ignored: Tensor, transform: HeadTransform
    ) -> None:
        self._temperature = rows_of(transform.temperature, tile.shape[0])
        self._targets, self._ignored = targets.contiguous(), ignored.contiguous()
        self.arguments: list[Argument] = [
            address(tile),
            *(ctypes.c_int64(size) for size in (*tile.shape, tile.stride(0))),
            ctypes.c_float(transform.softcap or 0.0),
            ctypes.c_float(transform.logit_scale),
            *(address(value) for value in (self._temperature, self._targets, self._ignored)),
        ]


def statistics(
    tile: Tensor, targets: Tensor, ignored: Tensor, transform: HeadTransform, with_entropy: bool
) -> TileStatistics:
    """See `head_tile_statistics`."""
    found = TileStatistics.empty(tile.shape[0], tile.device, with_entropy)
    read = _Tile(tile, targets, ignored, transform)
    places = (found.maximum, found.total, found.weighted, found.target)
    call(
        "head_tile_statistics",
        tile.device,
        [*read.arguments, *(address(place) for place in places)],
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
    read = _Tile(tile, targets, ignored, transform)
    rows = [value.contiguous() for value in (known.maximum, known.log_total, known.entropy)]
    upstream = [rows_of(value, tile.shape[0]) for value in (grad_logprob, grad_entropy)]
    call(
        "head_tile_gradient",
        tile.device,
        [
            *read.arguments,
            *(address(value) for value in rows),
            address(gradient),
            ctypes.c_int32(DTYPE_CODES[gradient.dtype]),
            ctypes.c_int64(gradient.stride(0)),
            *(address(value) for value in upstream),
        ],
    )
