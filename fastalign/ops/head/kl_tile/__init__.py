"""One pass over two heads' tiles of products: both log-probs, the entropy, the KL, the gradients.

`head_tile`'s companion for `linear_kl`. The tiles are a policy's and a reference's products in the
accumulation dtype; one transform turns both into logits. Without upstream gradients the pass gives
each row's two *brackets*, the derivatives of its log-prob and of its KL by the policy's products,

    (1[v = y] - p_v) dz_v / dproduct_v
    p_v (log p_v - log q_v - KL) dz_v / dproduct_v    of KL(policy || reference)
    (p_v - q_v) dz_v / dproduct_v                     of KL(reference || policy)

which do not depend on the loss; with upstream gradients their combination, and the entropy's part.

Legend: C tile rows, V vocabulary, S strip rows.
"""

from types import ModuleType

from torch import Tensor

from fastalign.ops.backends import on_device
from fastalign.ops.head.head_tile import HeadTransform
from fastalign.ops.head.kl_tile import strips
from fastalign.ops.head.kl_tile.statistics import PairStatistics, Upstream

__all__ = ["PairStatistics", "Upstream", "read_pair"]


def _kernels(backend: str) -> ModuleType:
    """The backend's launcher, `read`."""
    if backend == "native":
        from fastalign.ops.head.kl_tile import native

        return native
    assert backend == "triton"
    from fastalign.ops.head.kl_tile import triton_kernels

    return triton_kernels


def read_pair(
    tiles: Tensor,
    targets: Tensor,
    ignored: Tensor,
    transform: HeadTransform,
    over_reference: bool,
    backend: str,
    scratch: Tensor | None,
    *,
    brackets: Tensor | None = None,
    gradient: Tensor | None = None,
    upstream: Upstream | None = None,
) -> PairStatistics:
    """Reads the statistics of tiles (2, C, V), destroying them; writes what is given a place.

    Args:
        tiles: The policy's and the reference's products plus bias, in the accumulation dtype; all
            rows as far apart.
        targets: (C,) int64, in range even where ignored.
        ignored: (C,) bool; their statistics and gradients are 0.
        transform: What turns the products of both into logits.
        over_reference: KL(reference || policy) instead of KL(policy || reference).
        backend: "torch", "native" or "triton".
        scratch: For "torch": (4, S, V) of the tiles' dtype; S rows are worked on at a time.
        brackets: (2, C, V), float32 or bfloat16 (for "torch", any): receives the brackets of the
            log-prob and of the KL; may be `tiles` itself.
        gradient: (C, V), likewise, in the place of brackets: receives the gradient by the policy's
            products, given `upstream`; may be `tiles[0]` itself.
        upstream: (C,) gradients of the log-probs, entropies and KLs, with `gradient`.
    """
    assert (gradient is None) == (upstream is None)
    assert brackets is None or gradient is None
    if backend == "torch":
        assert scratch is not None
        return strips.read(
            tiles,
            targets,
            ignored,
            transform,
            over_reference,
            scratch,
            brackets,
            gradient,
            upstream,
        )
    with on_device(tiles):
        read: PairStatistics = _kernels(backend).read(
            tiles, targets, ignored, transform, over_reference, brackets, gradient, upstream
        )
    return read
