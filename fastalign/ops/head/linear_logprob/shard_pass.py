"""The head in tiles on one rank of a process group that shares the vocabulary.

As `chunked`, with each rank's statistics of a tile combined with those of the others before its
logits become their gradient. Communication: per tile of the forward one maximum and one sum, of
one and of up to three numbers a row; the hidden states' gradient is summed in float32, while the
weight's is computed (a frozen head's `direction`: while the next tile is projected). Rows that are
computed again need none, for their statistics are known.

Legend: N rows, V this rank's columns, D hidden, n tile rows.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.ops.head.buffers import Buffers
from fastalign.ops.head.head_tile import (
    RowStatistics,
    SoftmaxStatistics,
    TileStatistics,
    head_tile_gradient,
    head_tile_statistics,
)
from fastalign.ops.head.head_tile.strips import LOWEST_SHIFTED_LOGIT
from fastalign.ops.head.linear_logprob.chunked import (
    add_weight_products,
    concatenate,
    scaled_rows,
    tile_spans,
)
from fastalign.ops.head.linear_logprob.operands import Gradients, HeadInputs
from fastalign.ops.head.products import accumulation_dtype, product
from fastalign.ops.head.vocabulary_shard import VocabularyShard


class ShardPass:
    """The passes over one head: `forward`, then `backward` with what it found.

    Attributes:
        known: Each row's softmax over the whole vocabulary, (N,) each; the forward sets it.
    """

    def __init__(self, shard: VocabularyShard, known: SoftmaxStatistics | None = None) -> None:
        self._shard = shard
        self._group = shard.process_group
        self.known = known

    def forward(
        self,
        head: HeadInputs,
        buffers: Buffers,
        *,
        kept: Tensor | None = None,
        direction: Tensor | None = None,
        with_entropy: bool = True,
    ) -> RowStatistics:
        """As `chunked.forward`; `direction` receives the sum over all ranks."""
        num_rows = head.hidden.shape[0]
        num_kept = 0 if kept is None else kept.shape[0]
        parts, known, under_way = [], [], []
        for start, stop in tile_spans(num_rows, num_kept, buffers.tile_rows):
            rows = head.rows(start, stop)
            place = kept[start:stop] if kept is not None and start < num_kept else None
            if place is not None and buffers.projects_in_place:
                tile = place
            else:
                tile = buffers.tile(stop - start)
            found = self._read(rows, tile, buffers, with_entropy)
            read, softmax = self._combined(rows, found)
            parts.append(read)
            known.append(softmax)
            if place is None and direction is not None:
                place = buffers.converted(stop - start)
            if place is not None:
                self._write_gradient(rows, tile, softmax, buffers, place)
            if direction is not None:
                assert place is not None
                _multiply(place, rows.weight, out=direction[start:stop])
                under_way.append(self._sum(direction[start:stop]))
        for work in under_way:
            work.wait()
        read = concatenate(parts, head.hidden)
        none = read.logprob[:0]
        self.known = SoftmaxStatistics(
            torch.cat([none, *(part.maximum for part in known)]),
            torch.cat([none, *(part.log_total for part in known)]),
            torch.cat([none, *(part.entropy for part in known)]),
        )
        return read

    def backward(
        self,
        head: HeadInputs,
        buffers: Buffers,
        gradients: Gradients,
        grad_logprob: Tensor,
        *,
        grad_entropy: Tensor | None = None,
        kept: Tensor | None = None,
        direction: Tensor | None = None,
    ) -> None:
        """As `chunked.backward`; the hidden states' gradient is the sum over all ranks."""
        assert self.known is not None
        num_rows = head.hidden.shape[0]
        grad_logprob = grad_logprob.masked_fill(head.ignored, 0.0)
        if grad_entropy is None and direction is not None:
            if gradients.hidden is not None:
                gradients.hidden.copy_(scaled_rows(direction, grad_logprob, head.ignored))
            return
        num_kept = 0 if kept is None or grad_entropy is not None else kept.shape[0]
        if kept is not None and num_kept:
            kept_rows = (head.rows(0, num_kept), gradients.rows(0, num_kept))
            self._add_products(kept, *kept_rows, grad_logprob[:num_kept])
        for start, stop in tile_spans(num_rows - num_kept, 0, buffers.tile_rows):
            start, stop = start + num_kept, stop + num_kept
            rows = head.rows(start, stop)
            tile, place = buffers.tile(stop - start), buffers.converted(stop - start)
            if tile.shape[1]:
                rows.project(out=tile)
            upstream = None
            if grad_entropy is not None:
                upstream = (grad_logprob[start:stop], grad_entropy[start:stop])
            softmax = self.known.rows(start, stop)
            self._write_gradient(rows, tile, softmax, buffers, place, upstream)
            scale = grad_logprob[start:stop] if grad_entropy is None else None
            self._add_products(place, rows, gradients.rows(start, stop), scale)

    def _read(
        self, rows: HeadInputs, tile: Tensor, buffers: Buffers, with_entropy: bool
    ) -> TileStatistics:
        """Projects the rows into `tile` and reads what its columns tell."""
        if tile.shape[1] == 0:
            return TileStatistics.of_no_columns(
                tile.shape[0], tile.device, with_entropy, tile.dtype
            )
        rows.project(out=tile)
        return head_tile_statistics(
            tile,
            rows.targets - self._shard.start,
            rows.ignored,
            rows.transform,
            buffers.backend,
            buffers.scratch,
            with_entropy=with_entropy,
        )

    def _combined(
        self, rows: HeadInputs, found: TileStatistics
    ) -> tuple[RowStatistics, SoftmaxStatistics]:
        """The statistics over all columns: one maximum and one sum over the ranks."""
        gain = rows.transform.gain(found.maximum)
        if isinstance(gain, Tensor):
            gain = gain.squeeze(1)
        maximum = found.maximum.clone()
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self._group)
        # a rank with nothing but -inf has sums of 0, and 0 * -inf would be NaN
        drop = ((found.maximum - maximum) * gain).clamp(min=LOWEST_SHIFTED_LOGIT)
        shrink = drop.exp()
        here = (rows.targets >= self._shard.start) & (rows.targets < self._shard.stop)
        shifted = torch.where(here, (found.target - maximum) * gain, 0.0)
        sums = [shrink * found.total, shifted]
        if found.weighted is not None:
            sums.append(shrink * (found.weighted + drop * found.total))
        packed = torch.stack(sums)
        dist.all_reduce(packed, group=self._group)
        shifted, total = packed[1], packed[0].masked_fill(rows.ignored, 1.0)
        log_total = total.log()
        entropy = torch.zeros_like(total)
        if found.weighted is not None:
            # rounding may leave a sure row a hair below zero
            entropy = (log_total - packed[2] / total).clamp_(min=0.0)
            entropy.masked_fill_(rows.ignored, 0.0)
        logprob = (shifted - log_total).masked_fill_(rows.ignored, 0.0)
        read = RowStatistics(logprob, entropy, shifted.ge(0.0) & ~rows.ignored)
        return read, SoftmaxStatistics(maximum, log_total, entropy)

    def _write_gradient(
        self,
        rows: HeadInputs,
        tile: Tensor,
        softmax: SoftmaxStatistics,
        buffers: Buffers,
        place: Tensor,
        upstream: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Turns the tile of products into its gradient, or into the brackets."""
        if tile.shape[1] == 0:
            return
        grad_logprob, grad_entropy = upstream or (None, None)
        head_tile_gradient(
            tile,
            rows.targets - self._shard.start,
            rows.ignored,
            rows.transform,
            softmax,
            buffers.backend,
            buffers.scratch,
            gradient=place,
            grad_logprob=grad_logprob,
            grad_entropy=grad_entropy,
        )

    def _sum(self, partial: Tensor) -> dist.Work:
        """Begins the sum of `partial` over the ranks, in place."""
        work: dist.Work = dist.all_reduce(partial, group=self._group, async_op=True)
        return work

    def _add_products(
        self, bracket: Tensor, head: HeadInputs, gradients: Gradients, scale: Tensor | None
    ) -> None:
        """The gradient products of bracket (n, V), whose rows count `scale` (n,) times, or once."""
        dtype = accumulation_dtype(head.hidden.dtype)
        if scale is None:
            scale = torch.ones_like(head.ignored, dtype=dtype)
        under_way = []
        for weight, of_rows in (
            (head.weight, gradients.hidden),
            (head.lora_weight, gradients.lora_hidden),
        ):
            if of_rows is not None and weight is not None:
                direction = torch.empty(of_rows.shape, dtype=dtype, device=bracket.device)
                _multiply(bracket, weight, out=direction)
                under_way.append((self._sum(direction), direction, of_rows))
        if bracket.shape[1]:
            add_weight_products(bracket, head, gradients, scale)
        for work, direction, of_rows in under_way:
            work.wait()
            of_rows.copy_(scaled_rows(direction, scale, head.ignored))


def _multiply(bracket: Tensor, weight: Tensor, out: Tensor) -> None:
    """Writes bracket @ weight into `out`: zeros from an empty shard."""
    if weight.shape[0]:
        product(bracket, weight, out=out)
    else:
        out.zero_()
