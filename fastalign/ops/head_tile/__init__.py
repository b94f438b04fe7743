"""One pass over a tile of a head's products: each row's statistics, and its gradient in place.

Shared, unchanged, by `linear_logprob` and `fused_linear_loss`. A tile is C rows of products in the
accumulation dtype (float32; float64 for float64 inputs). The pass gives each row's log-prob and
entropy, and overwrites the row with a gradient by its products. Without upstream gradients that is
the row's *bracket*,

    bracket_v = d logprob / d product_v = (1[v = y] - p_v) * dz_v / dproduct_v,

which does not depend on the loss: whatever coefficient g a loss later gives to the row's log-prob,
the gradients are g * (bracket @ W) and bracket^T @ (g * hidden). So no pass over the tile follows.

Legend: C tile rows, V vocabulary.
"""

from types import ModuleType

from torch import Tensor

from fastalign.ops.backends import on_device
from fastalign.ops.head_tile import strips
from fastalign.ops.head_tile.transform import HeadTransform, RowStatistics

__all__ = ["HeadTransform", "RowStatistics", "read_tile"]


def _kernels(backend: str) -> ModuleType:
    """The backend's launcher, `read`."""
    if backend == "native":
        from fastalign.ops.head_tile import native

        return native
    assert backend == "triton"
    from fastalign.ops.head_tile import triton_kernels

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
