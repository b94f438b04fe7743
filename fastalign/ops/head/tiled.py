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
from fastalign.ops.head.head_product import read_products
from fastalign.ops.head.head_tile import RowStatistics, SoftmaxStatistics, Tile, Upstream, read_tile
from fastalign.ops.head.operands import Gradients, HeadInputs, Needs
from fastalign.ops.head.products import accumulation_dtype, product


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

    def holds_all(self, num_rows: int) -> bool:
        """Return True if a loss of log-probs alone needs no row computed again."""
        if self.jacobian is not None:
            return True
        return self.brackets is not None and self.brackets.shape[0] == num_rows


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
        if buffers.backend == "epilogue":
            parts.append(read_products(rows, with_entropy))
            continue
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
            scaled_rows(saved.jacobian, grad_logprob, head.ignored, out=gradients.hidden)
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


def scaled_rows(rows: Tensor, scale: Tensor, ignored: Tensor, out: Tensor) -> Tensor:
    """Write rows (n, k) times scale (n,), rounded once, into `out`; return it.

    Zero where ignored, even if the row holds a NaN.
    """
    factor = scale[:, None].to(accumulation_dtype(rows.dtype))
    return torch.mul(rows, factor, out=out).masked_fill_(ignored[:, None], 0.0)


def num_weight_products(num_rows: int, num_saved: int, tile_rows: int) -> int:
    """Return the products that one backward adds to a weight's gradient.

    Args:
        num_rows: rows of the call.
        num_saved: rows whose saved brackets are used, in one product.
        tile_rows: rows of each product of the others.
    """
    return (num_saved > 0) + len(tile_spans(num_rows - num_saved, 0, tile_rows))


@dataclass
class RowJacobians:
    """bracket @ W of some rows, and bracket @ B under LoRA, (n, D) and (n, r).

    In the accumulation dtype; None where not wanted. Ranks that share the vocabulary may still be
    adding them up: `write` waits for that.
    """

    hidden: Tensor | None
    lora_hidden: Tensor | None
    pending: list[dist.Work]

    def write(self, gradients: Gradients, scale: Tensor, ignored: Tensor) -> None:
        """Write the rows' gradients: `scale` (n,) times these, and zeros where ignored."""
        for work in self.pending:
            work.wait()
        for jacobian, of_rows in (
            (self.hidden, gradients.hidden),
            (self.lora_hidden, gradients.lora_hidden),
        ):
            if jacobian is not None and of_rows is not None:
                scaled_rows(jacobian, scale, ignored, out=of_rows)


def row_jacobians(
    bracket: Tensor, head: HeadInputs, needs: Needs, reader: TileReader = ONE_PROCESS
) -> RowJacobians:
    """Return the products of bracket (n, V) that are wanted for the rows' gradients."""
    dtype, num_rows = accumulation_dtype(head.hidden.dtype), bracket.shape[0]
    pending = []

    def multiplied(wanted: bool, weight: Tensor | None) -> Tensor | None:
        if weight is None or not wanted:
            return None
        jacobian = torch.empty((num_rows, weight.shape[1]), dtype=dtype, device=bracket.device)
        _multiply(bracket, weight, out=jacobian)
        work = reader.begin_sum(jacobian)
        if work is not None:
            pending.append(work)
        return jacobian

    hidden = multiplied(needs.hidden, head.weight)
    return RowJacobians(hidden, multiplied(needs.lora_hidden, head.lora_weight), pending)


def add_products(
    bracket: Tensor,
    head: HeadInputs,
    gradients: Gradients,
    scale: Tensor | None,
    reader: TileReader = ONE_PROCESS,
) -> None:
    """Add the gradient products of bracket (n, V), whose rows count `scale` (n,) times, or once."""
    if scale is None:
        scale = torch.ones_like(head.ignored, dtype=accumulation_dtype(head.hidden.dtype))
    rows = row_jacobians(bracket, head, gradients.needs, reader)
    add_weight_products(bracket, (head.hidden, head.lora_hidden), head.ignored, gradients, scale)
    rows.write(gradients, scale, head.ignored)  # ranks added them up meanwhile


def _multiply(bracket: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write bracket @ weight into `out`: zeros from an empty shard."""
    if weight.shape[0]:
        product(bracket, weight, out=out)
    else:
        out.zero_()


def add_weight_products(
    bracket: Tensor,
    rows: tuple[Tensor, Tensor | None],
    ignored: Tensor,
    gradients: Gradients,
    scale: Tensor,
) -> None:
    """Add the products that are gradients of weight, bias and LoRA's B.

    Args:
        bracket: (n, V) brackets, in the products' dtype.
        rows: hidden states (n, D) and, of an adapted head, what its B multiplies (n, r).
        ignored: (n,) bool.
        gradients: receives the products.
        scale: (n,) coefficient of each row and whatever else multiplies the gradient: it multiplies
            n rows of D before the product, not V of them behind it.
    """
    if bracket.shape[1] == 0:  # the empty shard of a rank
        return
    for values, of_weight in zip(rows, (gradients.weight, gradients.lora_weight), strict=True):
        if of_weight is not None and values is not None:
            weighted = torch.empty(values.shape, dtype=bracket.dtype, device=bracket.device)
            of_weight.add(bracket.t(), scaled_rows(values, scale, ignored, out=weighted))
    if gradients.bias is not None:
        gradients.bias.add(bracket.t(), scale[:, None].to(bracket.dtype))
