"""One pass over a tile of a head's products: each row's statistics, and its gradient in place.

Shared, unchanged, by `linear_logprob` and `fused_linear_loss`. A tile is C rows of products in the
accumulation dtype (float32; float64 for float64 inputs). The pass gives each row's log-prob and
entropy, and overwrites the row with a gradient by its products. Without upstream gradients that is
the row's *bracket*,

    bracket_v = d logprob / d product_v = (1[v = y] - p_v) * dz_v / dproduct_v,

which does not depend on the loss: whatever coefficient g a loss later gives to the row's log-prob,
the gradients are g * (bracket @ W) and bracket^T @ (g * hidden). So no pass over the tile follows.

`head_tile_statistics` and `head_tile_gradient` are the same pass in two, for a process that holds
some of the columns: between them its statistics are combined with those of the others.

Legend: C tile rows, V vocabulary.
"""

from types import ModuleType

from torch import Tensor

from fastalign.ops.backends import on_device
from fastalign.ops.head.head_tile import strips
from fastalign.ops.head.head_tile.split import strips as split_strips
from fastalign.ops.head.head_tile.transform import (
    HeadTransform,
    RowStatistics,
    SoftmaxStatistics,
    TileStatistics,
)

__all__ = [
    "HeadTransform",
    "RowStatistics",
    "SoftmaxStatistics",
    "TileStatistics",
    "head_tile_gradient",
    "head_tile_statistics",
    "read_tile",
]


def _kernels(backend: str) -> ModuleType:
    """The backend's launcher, `read`."""
    if backend == "native":
        from fastalign.ops.head.head_tile import native

        return native
    assert backend == "triton"
    from fastalign.ops.head.head_tile import triton_kernels

    return triton_kernels


def _split_kernels(backend: str) -> ModuleType:
    """The backend's launchers, `statistics` and `gradient`."""
    if backend == "native":
        from fastalign.ops.head.head_tile.split import native

        return native
    assert backend == "triton"
    from fastalign.ops.head.head_tile.split import triton_kernels

    return triton_kernels


def read_tile(
    tile: Tensor,
    targets: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    backend: str,
    scratch: Tensor | None,
    *,
    gradient: Tensor | None = None,
    grad_logprob: Tensor | None = None,
    grad_entropy: Tensor | None = None,
    with_entropy: bool = True,
) -> RowStatistics:
    """Reads the statistics of tile (C, V), destroying it; writes `gradient` if given.

    Args:
        tile: Products plus bias, in the accumulation dtype.
        targets: (C,) int64, in range even where ignored.
        ignored: (C,) bool; their statistics and gradients are 0.
        transform: What turns the products into logits.
        backend: "torch", "native" or "triton".
        scratch: For "torch": (2, S, V) of the tile's dtype; S rows are worked on at a time.
        gradient: (C, V), float32 or bfloat16 (for "torch", any); may be `tile` itself.
        grad_logprob: (C,) upstream; None: ones.
        grad_entropy: (C,) upstream; None: zeros.
        with_entropy: Whether to compute entropies; anything may be returned otherwise.
    """
    upstream = (grad_logprob, grad_entropy)
    if backend == "torch":
        assert scratch is not None
        return strips.read(tile, targets, ignored, transform, scratch, gradient, *upstream)
    with on_device(tile):
        read: RowStatistics = _kernels(backend).read(
            tile, targets, ignored, transform, gradient, *upstream, with_entropy
        )
    return read


def head_tile_statistics(
    tile: Tensor,
    targets: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    backend: str,
    scratch: Tensor | None,
    *,
    with_entropy: bool = True,
) -> TileStatistics:
    """The statistics of tile (C, V), V > 0, which stays as it is: one read.

    Args:
        tile: Products plus bias, in the accumulation dtype.
        targets: (C,) int64 columns of the tile; one outside it is another process's.
        ignored: (C,) bool.
        transform: What turns the products into logits.
        backend: "torch", "native" or "triton".
        scratch: For "torch": (2, S, V) of the tile's dtype; S rows are worked on at a time.
        with_entropy: Whether to compute `weighted`.
    """
    arguments = (tile, targets, ignored, transform)
    if backend == "torch":
        assert scratch is not None
        return split_strips.statistics(*arguments, scratch, with_entropy)
    with on_device(tile):
        found: TileStatistics = _split_kernels(backend).statistics(*arguments, with_entropy)
    return found


def head_tile_gradient(
    tile: Tensor,
    targets: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    known: SoftmaxStatistics,
    backend: str,
    scratch: Tensor | None,
    *,
    gradient: Tensor,
    grad_logprob: Tensor | None = None,
    grad_entropy: Tensor | None = None,
) -> None:
    """Writes `gradient` as `read_tile` does, given each row's softmax: one read and one write.

    Args:
        tile: As for the statistics; destroyed.
        targets: As for the statistics.
        ignored: (C,) bool; their gradients are 0.
        transform: What turns the products into logits.
        known: The softmax over all columns, these and those of other processes; in the tile's
            dtype.
        backend: "torch", "native" or "triton".
        scratch: As for the statistics.
        gradient: (C, V), float32 or bfloat16 (for "torch", any); may be `tile` itself.
        grad_logprob: (C,) upstream; None: ones.
        grad_entropy: (C,) upstream; None: zeros.
    """
    arguments = (tile, targets, ignored, transform, known)
    upstream = (gradient, grad_logprob, grad_entropy)
    if backend == "torch":
        assert scratch is not None
        split_strips.gradient(*arguments, scratch, *upstream)
        return
    with on_device(tile):
        _split_kernels(backend).gradient(*arguments, *upstream)
