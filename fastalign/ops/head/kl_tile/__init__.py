"""One pass over two heads' tiles of products: log-probs, entropy, KL and their gradients."""

from fastalign.ops.head.kl_tile.passes import read_pair
from fastalign.ops.head.kl_tile.statistics import PairStatistics, PairUpstream

__all__ = ["PairStatistics", "PairUpstream", "read_pair"]
