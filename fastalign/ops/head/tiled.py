"""A head in tiles: log-probs forward, products backward, with a bounded number of logits.

`forward` and `backward` work on operands that are already rounded (`products.operand`) and know
nothing of autograd; `linear_logprob` and `fused_linear_loss` are built on them.

Legend: N rows, V vocabulary, D hidden, n tile rows, K rows whose brackets are saved. Products, in
units of N * D * V FLOPs: forward 2, plus 2 for a frozen head; backward 4 for saved rows, 6 for
others, 0 for a frozen head (under LoRA, whose B needs the brackets too: 2 for saved rows, 4 for
others).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.ops.head.buffers import Buffers
from fastalign.ops.head.head_tile import RowStatistics, SoftmaxStatistics, Tile, Upstream, read_tile
from fastalign.ops.head.operands import Gradients, HeadInputs
from fastalign.ops.head.products import accumulation_dtype, add_product, product


@dataclass
class Saved:
    """Results of a forward that its backward needs.

    Attributes:
        brackets: (K, V) brackets of the first K rows, in the products' dtype, or None.
        jacobian: (N, D) bracket @ W, the log-probs' derivatives by the hidden states, in the
            accumulation dtype; None where brackets are saved instead.
        softmax: softmax of every row over the vocabulary that ranks share; else None.
    """

    brackets: Tensor | None
    jacobian: Tensor | None
    softmax: SoftmaxStatistics | None = None


class TileReader(Protocol):
    """Reader of tiles: one process, or one of the ranks that share the vocabulary."""

    def read(
        self, tile: Tile, buffers: Buffers, bracket: Tensor | None, with_entropy: bool
    ) -> RowStatistics:
        """Read the statistics of projected rows; write their bracket if given."""

    def reread(
        self,
        tile: Tile,
        buffers: Buffers,
        gradient: Tensor,
        upstream: Upstream,
        softmax: SoftmaxStatistics | None,
    ) -> None:
        """Write the gradient of rows that are projected again."""

    def begin_sum(self, partial: Tensor) -> dist.Work | None:
        """Begin the sum of a product over the ranks, in place; None: it is complete."""


class OneProcess:
    """Reader of a whole head's tiles."""

    def read(
        self, tile: Tile, buffers: Buffers, bracket: Tensor | None, with_entropy: bool
    ) -> RowStatistics:
        """Read statistics and write the bracket in one pass."""
        backend, scratch = buffers.backend, buffers.scratch
        return read_tile(tile, backend, scratch, gradient=bracket, with_entropy=with_entropy)

    def reread(
        self,
        tile: Tile,
        buffers: Buffers,
        gradient: Tensor,
        upstream: Upstream,
        softmax: SoftmaxStatistics | None,
    ) -> None:
        """Write the gradient, from statistics that are read again."""
        assert softmax is None
        backend, scratch = buffers.backend, buffers.scratch
        read_tile(tile, backend, scratch, gradient=gradient, upstream=upstream, with_entropy=False)

    def begin_sum(self, partial: Tensor) -> None:
        """Do nothing: one process has the whole sum."""


ONE_PROCESS = OneProcess()


def forward(
    head: HeadInputs,
    buffers: Buffers,
    saved: Saved,
    *,
    with_entropy: bool = True,
    reader: TileReader = ONE_PROCESS,
) -> RowStatistics:
    """Read every row's statistics; write what the backward needs into `saved`.

    Args:
        head: operands of N rows.
        buffers: scratch memory.
        saved: tensors that receive brackets, or bracket @ W; ranks add their softmax.
        with_entropy: also compute entropies (zeros otherwise).
        reader: one process, or ranks that share the vocabulary.
    """
    num_rows, brackets = head.hidden.shape[0], saved.brackets
    num_saved = 0 if brackets is None else brackets.shape[0]
    parts, pending = [], []
    for start, stop in tile_spans(num_rows, num_saved, buffers.tile_rows):
        rows = head.rows(start, stop)
        bracket = brackets[start:stop] if brackets is not None and start < num_saved else None
        if bracket is not None and buffers.projects_in_place:
            products = bracket
        else:
            products = buffers.tile(stop - start)
        rows.project(out=products)
        if bracket is None and saved.jacobian is not None:
            bracket = buffers.converted(stop - start)
        parts.append(reader.read(rows.tile(products), buffers, bracket, with_entropy))
        if saved.jacobian is not None:
            assert bracket is not None
            jacobian = saved.jacobian[start:stop]
            _multiply(bracket, rows.weight, out=jacobian)
            # ranks sum it while the next tile is projected
            pending.append(reader.begin_sum(jacobian))
    for work in pending:
        if work is not None:
            work.wait()
    dtype = accumulation_dtype(head.hidden.dtype)
    read = RowStatistics.joined(parts, torch.empty(0, dtype=dtype, device=head.hidden.device))
    saved.softmax = read.softmax
    return read


def tile_spans(num_rows: int, num_saved: int, tile_rows: int) -> list[tuple[int, int]]:
    """Return spans of at most `tile_rows` rows, none of them across the end of the saved rows."""
    spans = []
    for first, last in ((0, num_saved), (num_saved, num_rows)):
        for start in range(first, last, tile_rows):
            spans.append((start, min(start + tile_rows, last)))
    return spans


def backward(
    head: HeadInputs,
    buffers: Buffers,
    gradients: Gradients,
    saved: Saved,
    upstream: Upstream,
    reader: TileReader = ONE_PROCESS,
) -> None:
    """Write the gradients, given those (N,) of the log-probs and, or not, of the entropies.

    Without an entropy gradient, what the forward saved is scaled; with one, every row's logits are
    computed again, because entropy asks for another combination of them.
    """
    assert upstream.logprob is not None
    num_rows, brackets = head.hidden.shape[0], saved.brackets
    grad_logprob = upstream.logprob.masked_fill(head.ignored, 0.0)
    if upstream.entropy is None and saved.jacobian is not None:
        if gradients.hidden is not None:
            gradients.hidden.copy_(scaled_rows(saved.jacobian, grad_logprob, head.ignored))
        return
    num_saved = 0
    if upstream.entropy is None and brackets is not None and brackets.shape[0]:
        num_saved = brackets.shape[0]
        first = (head.rows(0, num_saved), gradients.rows(0, num_saved))
        add_products(brackets, *first, grad_logprob[:num_saved], reader)
    for start, stop in tile_spans(num_rows - num_saved, 0, buffers.tile_rows):
        start, stop = start + num_saved, stop + num_saved
        rows = head.rows(start, stop)
        products, gradient = buffers.tile(stop - start), buffers.converted(stop - start)
        rows.project(out=products)
        # Without an entropy gradient the pass writes brackets: the products scale their rows.
        scale: Tensor | None = grad_logprob[start:stop]
        by_row = Upstream()
        if upstream.entropy is not None:
            by_row, scale = Upstream(scale, upstream.entropy[start:stop]), None
        softmax = None if saved.softmax is None else saved.softmax.rows(start, stop)
        reader.reread(rows.tile(products), buffers, gradient, by_row, softmax)
        add_products(gradient, rows, gradients.rows(start, stop), scale, reader)


def scaled_rows(rows: Tensor, scale: Tensor, ignored: Tensor) -> Tensor:
    """Return the rows times scale, and zero where ignored even if the row holds a NaN."""
    return (rows * scale[:, None].to(rows.dtype)).masked_fill_(ignored[:, None], 0.0)


def add_products(
    bracket: Tensor,
    head: HeadInputs,
    gradients: Gradients,
    scale: Tensor | None,
    reader: TileReader = ONE_PROCESS,
) -> None:
    """Add the gradient products of bracket (n, V), whose rows count `scale` (n,) times, or once."""
    dtype = accumulation_dtype(head.hidden.dtype)
    if scale is None:
        scale = torch.ones_like(head.ignored, dtype=dtype)
    pending = []
    for weight, of_rows in (
        (head.weight, gradients.hidden),
        (head.lora_weight, gradients.lora_hidden),
    ):
        if of_rows is not None and weight is not None:
            jacobian = torch.empty(of_rows.shape, dtype=dtype, device=bracket.device)
            _multiply(bracket, weight, out=jacobian)
            work = reader.begin_sum(jacobian)
            if work is None:
                of_rows.copy_(scaled_rows(jacobian, scale, head.ignored))
            else:
                pending.append((work, jacobian, of_rows))
    if bracket.shape[1]:
        _add_weight_products(bracket, head, gradients, scale)
    for work, jacobian, of_rows in pending:  # summed while the weight's gradient was computed
        work.wait()
        of_rows.copy_(scaled_rows(jacobian, scale, head.ignored))


def _multiply(bracket: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write bracket @ weight into `out`: zeros from an empty shard."""
    if weight.shape[0]:
        product(bracket, weight, out=out)
    else:
        out.zero_()


def _add_weight_products(
    bracket: Tensor, head: HeadInputs, gradients: Gradients, scale: Tensor
) -> None:
    """Add the products that are gradients of weight, bias and LoRA's B."""
    dtype = accumulation_dtype(head.hidden.dtype)
    for rows, of_weight in (
        (head.hidden, gradients.weight),
        (head.lora_hidden, gradients.lora_weight),
    ):
        if of_weight is not None and rows is not None:
            weighted = scaled_rows(rows.to(dtype), scale, head.ignored).to(bracket.dtype)
            add_product(bracket.t(), weighted, out=of_weight)
    if gradients.bias is not None:
        column = scale[:, None].to(bracket.dtype)
        add_product(bracket.t(), column, out=gradients.bias[:, None])
