"""Tiles of a head whose vocabulary is shared by a process group.

Each rank's statistics of a tile are combined with those of the others before its logits become
their gradient. Communication: per tile of the forward one maximum and one sum, of one and of up to
three numbers a row; the hidden states' gradient is summed in float32, while the weight's is
computed (a frozen head's Jacobian: while the next tile is projected). Rows that are computed again
need none, for their softmax is saved.

Legend: n tile rows, V this rank's columns.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.ops.head.buffers import Buffers
from fastalign.ops.head.head_tile import (
    LOWEST_SHIFTED_LOGIT,
    RowStatistics,
    SoftmaxStatistics,
    Tile,
    TileStatistics,
    Upstream,
    head_tile_gradient,
    head_tile_statistics,
)
from fastalign.ops.head.vocabulary_shard import VocabularyShard


class ShardReader:
    """Reader of one rank's columns; see `tiled.TileReader`."""

    def __init__(self, shard: VocabularyShard) -> None:
        self._shard = shard
        self._group = shard.process_group

    def read(
        self, tile: Tile, buffers: Buffers, bracket: Tensor | None, with_entropy: bool
    ) -> RowStatistics:
        """Read the statistics over all ranks' columns; write these columns' bracket if given."""
        num_rows, num_columns = tile.products.shape
        if num_columns:
            scratch, own = buffers.scratch, self._own(tile)
            found = head_tile_statistics(own, buffers.backend, scratch, with_entropy=with_entropy)
        else:
            like = (tile.products.device, with_entropy, tile.products.dtype)
            found = TileStatistics.of_no_columns(num_rows, *like)
        read = self._combined(tile, found)
        if bracket is not None:
            self.reread(tile, buffers, bracket, Upstream(), read.softmax)
        return read

    def reread(
        self,
        tile: Tile,
        buffers: Buffers,
        gradient: Tensor,
        upstream: Upstream,
        softmax: SoftmaxStatistics | None,
    ) -> None:
        """Write the gradient by these columns, given each row's softmax over all."""
        assert softmax is not None
        if tile.products.shape[1]:
            where = (buffers.backend, buffers.scratch)
            head_tile_gradient(
                self._own(tile), softmax, *where, gradient=gradient, upstream=upstream
            )

    def begin_sum(self, partial: Tensor) -> dist.Work:
        """Begin the sum of `partial` over the ranks, in place."""
        work: dist.Work = dist.all_reduce(partial, group=self._group, async_op=True)
        return work

    def _own(self, tile: Tile) -> Tile:
        """Return the tile with targets as columns of this shard."""
        return replace(tile, targets=tile.targets - self._shard.start)

    def _combined(self, tile: Tile, found: TileStatistics) -> RowStatistics:
        """Return the statistics over all columns: one maximum and one sum over the ranks."""
        gain = tile.transform.gain(found.maximum)
        if isinstance(gain, Tensor):
            gain = gain.squeeze(1)
        maximum = found.maximum.clone()
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self._group)
        # a rank with nothing but -inf has sums of 0, and 0 * -inf would be NaN
        drop = ((found.maximum - maximum) * gain).clamp(min=LOWEST_SHIFTED_LOGIT)
        shrink = drop.exp()
        here = (tile.targets >= self._shard.start) & (tile.targets < self._shard.stop)
        shifted = torch.where(here, (found.target - maximum) * gain, 0.0)
        sums = [shrink * found.total, shifted]
        if found.weighted is not None:
            sums.append(shrink * (found.weighted + drop * found.total))
        packed = torch.stack(sums)
        dist.all_reduce(packed, group=self._group)
        shifted, total = packed[1], packed[0].masked_fill(tile.ignored, 1.0)
        log_total = total.log()
        # The targets of ignored rows are 0. NaN makes the row's gradient NaN on every rank.
        outside = (tile.targets < 0) | (tile.targets >= self._shard.vocab_size)
        entropy = torch.zeros_like(total)
        if found.weighted is not None:
            # rounding may leave a sure row a hair below zero
            entropy = (log_total - packed[2] / total).clamp_(min=0.0)
            entropy.masked_fill_(tile.ignored, 0.0)
        log_total = log_total.masked_fill(outside, torch.nan)
        logprob = (shifted - log_total).masked_fill_(tile.ignored, 0.0)
        is_argmax = shifted.ge(0.0) & ~(tile.ignored | outside)
        softmax = SoftmaxStatistics(maximum, log_total, entropy)
        return RowStatistics(logprob, entropy, is_argmax, softmax)
