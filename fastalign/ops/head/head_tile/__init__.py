"""One pass over a tile of a head's products: each row's statistics, and its gradient."""

from fastalign.ops.head.head_tile.passes import (
    head_tile_gradient,
    head_tile_statistics,
    read_tile,
)
from fastalign.ops.head.head_tile.tile import (
    HeadTransform,
    RowStatistics,
    SoftmaxStatistics,
    Tile,
    TileStatistics,
    Upstream,
)
from fastalign.ops.head.head_tile.torch_strips import LOWEST_SHIFTED_LOGIT

__all__ = [
    "LOWEST_SHIFTED_LOGIT",
    "HeadTransform",
    "RowStatistics",
    "SoftmaxStatistics",
    "Tile",
    "TileStatistics",
    "Upstream",
    "head_tile_gradient",
    "head_tile_statistics",
    "read_tile",
]
