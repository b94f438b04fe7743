"""One pass over a tile of a head's products: each row's statistics, and its gradient in place.

Shared by `linear_logprob` and `fused_linear_loss`. A tile is C rows of products in the accumulation
dtype (float32; float64 for float64 inputs). The pass gives each row's log-prob and entropy, and
overwrites the row with a gradient by its products. Without upstream gradients that is the row's
*bracket*,

    bracket_v = d logprob / d product_v = (1[v = y] - p_v) * dz_v / dproduct_v,

which does not depend on the loss: whatever coefficient g a loss later gives to the row's log-prob,
the gradients are g * (bracket @ W) and bracket^T @ (g * hidden). So no pass over the tile follows.

`head_tile_statistics` and `head_tile_gradient` are the same pass in two, for a process that holds
some of the columns: between them its statistics are combined with those of the others.

Each backend is a module with `read`, `statistics` and `gradient`. "torch" takes (2, S, V) of
scratch in the tile's dtype, and works on S rows at a time.

Legend: C tile rows, V vocabulary.
"""

from torch import Tensor

from fastalign.ops.backends import on_device
from fastalign.ops.head.head_tile import torch_strips
from fastalign.ops.head.head_tile.tile import (
    RowStatistics,
    SoftmaxStatistics,
    Tile,
    TileStatistics,
    Upstream,
)
from fastalign.ops.registration import kernels


def read_tile(
    tile: Tile,
    backend: str,
    scratch: Tensor | None,
    *,
    gradient: Tensor | None = None,
    upstream: Upstream = Upstream(),  # noqa: B008
    with_entropy: bool = True,
) -> RowStatistics:
    """Read the statistics of a tile, destroying its products; write `gradient` if given.

    Args:
        tile: products and what is needed to read them.
        backend: "torch", "native" or "triton".
        scratch: memory of the "torch" backend; else None or unused.
        gradient: (C, V), float32 or bfloat16 (for "torch", any); may be the products themselves.
            "triton" overwrites its padding as well, up to a multiple of 16 columns.
        upstream: gradients of the log-probs and entropies.
        with_entropy: also compute entropies; without, their values are undefined.
    """
    if backend == "torch":
        assert scratch is not None
        return torch_strips.read(tile, scratch, gradient, upstream)
    with on_device(tile.products):
        read: RowStatistics = kernels("head.head_tile", backend).read(
            tile, gradient, upstream, with_entropy
        )
    return read


def head_tile_statistics(
    tile: Tile, backend: str, scratch: Tensor | None, *, with_entropy: bool = True
) -> TileStatistics:
    """Read the statistics of a tile with V > 0, whose products stay as they are.

    Args:
        tile: products; a target that is no column of the tile is another process's.
        backend: "torch", "native" or "triton".
        scratch: memory of the "torch" backend.
        with_entropy: also compute `weighted`.
    """
    if backend == "torch":
        assert scratch is not None
        return torch_strips.statistics(tile, scratch, with_entropy)
    with on_device(tile.products):
        found: TileStatistics = kernels("head.head_tile", backend).statistics(tile, with_entropy)
    return found


def head_tile_gradient(
    tile: Tile,
    known: SoftmaxStatistics,
    backend: str,
    scratch: Tensor | None,
    *,
    gradient: Tensor,
    upstream: Upstream = Upstream(),  # noqa: B008
) -> None:
    """Write `gradient` as `read_tile` does, given each row's softmax: one read and one write.

    Args:
        tile: as for the statistics; its products are destroyed.
        known: softmax over all columns, these and those of other processes; in the tile's dtype.
        backend: "torch", "native" or "triton".
        scratch: memory of the "torch" backend.
        gradient: as for `read_tile`.
        upstream: gradients of the log-probs and entropies.
    """
    if backend == "torch":
        assert scratch is not None
        torch_strips.gradient(tile, known, scratch, gradient, upstream)
        return
    with on_device(tile.products):
        kernels("head.head_tile", backend).gradient(tile, known, gradient, upstream)
