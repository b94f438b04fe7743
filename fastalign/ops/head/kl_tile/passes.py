"""One pass over two heads' tiles of products: both log-probs, the entropy, the KL, the gradients.

The counterpart of `head_tile` for `linear_kl`. The tiles are a policy's and a reference's products
in the accumulation dtype; one transform turns both into logits. Without upstream gradients the pass
gives each row's two *brackets*, the derivatives of its log-prob and of its KL by the policy's
products,

    (1[v = y] - p_v) dz_v / dproduct_v
    p_v (log p_v - log q_v - KL) dz_v / dproduct_v    of KL(policy || reference)
    (p_v - q_v) dz_v / dproduct_v                     of KL(reference || policy)

which do not depend on the loss; with upstream gradients their combination, and the entropy's part.

Legend: C tile rows, V vocabulary, S strip rows.
"""

from torch import Tensor

from fastalign.ops.backends import on_device
from fastalign.ops.head.head_tile import Tile
from fastalign.ops.head.kl_tile import torch_strips
from fastalign.ops.head.kl_tile.statistics import PairStatistics, PairUpstream
from fastalign.ops.registration import kernels


def read_pair(
    tile: Tile,
    over_reference: bool,
    backend: str,
    scratch: Tensor | None,
    *,
    brackets: Tensor | None = None,
    gradient: Tensor | None = None,
    upstream: PairUpstream | None = None,
) -> PairStatistics:
    """Read the statistics of two heads' products (2, C, V), destroying them; write what is given.

    Args:
        tile: the policy's and the reference's products, with equal row strides, and what is needed
            to read them.
        over_reference: KL(reference || policy) instead of KL(policy || reference).
        backend: "torch", "native" or "triton".
        scratch: for "torch": (4, S, V) of the products' dtype; S rows are worked on at a time.
        brackets: (2, C, V), float32 or bfloat16 (for "torch", any): receives the brackets of the
            log-prob and of the KL; may be the products themselves. "triton" overwrites their
            padding as well, up to a multiple of 16 columns.
        gradient: (C, V), likewise, instead of brackets: receives the gradient by the policy's
            products, given `upstream`; may be the policy's products themselves.
        upstream: (C,) gradients of the log-probs, entropies and KLs, with `gradient`.
    """
    assert (gradient is None) == (upstream is None)
    assert brackets is None or gradient is None
    arguments = (tile, over_reference, brackets, gradient, upstream)
    if backend == "torch":
        assert scratch is not None
        return torch_strips.read(*arguments, scratch)
    with on_device(tile.products):
        read: PairStatistics = kernels("head.kl_tile", backend).read(*arguments)
    return read
