"""The loss and its gradient in one sweep over chunks of whole groups.

For each chunk: log-probs, then `loss_fn` under autograd on that small vector, which gives the
coefficient of each token's log-prob, then the gradient products.

Legend: T rows, V vocabulary, D hidden, G groups, n rows of a chunk.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.head import tiled
from fastalign.ops.head.buffers import Budget, Buffers
from fastalign.ops.head.call import HeadCall
from fastalign.ops.head.fused_linear_loss.chunk import LossFunction, TokenChunk, check_scalar
from fastalign.ops.head.head_tile import RowStatistics, Upstream
from fastalign.ops.head.operands import Gradients, HeadInputs, Needs
from fastalign.ops.head.products import accumulation_dtype


class GradientHolder:
    """Gradients computed in the forward, until the backward returns them, once."""

    def __init__(self, gradients: Sequence[Tensor | None]) -> None:
        self._gradients: list[Tensor | None] | None = list(gradients)

    def scaled(self, scale: Tensor) -> list[Tensor | None]:
        """Return the gradients times `scale`, in place: the weight's is large."""
        if self._gradients is None:
            raise RuntimeError(
                "fused_linear_loss computes its gradient once, in the forward, and has handed it "
                "on: call the function again to go backward a second time"
            )
        gradients, self._gradients = self._gradients, None
        return [None if g is None else g.mul_(scale.to(g.dtype)) for g in gradients]


class GradientInForward(torch.autograd.Function):
    """Give the loss a backward that multiplies gradients already computed."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        loss: Tensor,
        holder: GradientHolder,
        *leaves: Tensor | None,
    ) -> Tensor:
        """Return the loss as a function of the leaves, whose gradients are in `holder`."""
        ctx.holder = holder  # type: ignore[attr-defined]
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in leaves]  # type: ignore[attr-defined]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_loss: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients times the upstream one, each in its leaf's dtype."""
        gradients = ctx.holder.scaled(grad_loss)  # type: ignore[attr-defined]
        dtypes = ctx.dtypes  # type: ignore[attr-defined]
        cast = [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, dtypes, strict=True)
        ]
        return (None, None, *cast)


def group_chunks(bounds: Sequence[int], capacity: int) -> Iterator[tuple[int, int]]:
    """Yield spans of consecutive groups of at most `capacity` rows; a larger group comes alone."""
    num_groups = len(bounds) - 1
    start = 0
    while start < num_groups:
        # the last bound within reach; groups without rows at the border go along
        stop = bisect_right(bounds, bounds[start] + capacity) - 1
        stop = max(min(stop, num_groups), start + 1)
        yield start, stop
        start = stop


class Span(NamedTuple):
    """Rows and groups of one chunk."""

    row_start: int
    row_stop: int
    group_start: int
    group_stop: int


@dataclass(frozen=True)
class Sweep:
    """One call's sweep over its chunks.

    Attributes:
        head: operands, of all rows.
        loss_fn: loss of a chunk.
        budget: sizes of the buffers.
        needs: which gradients are wanted.
        gradients: where they are written.
        reader: one process, or ranks that share the vocabulary.
    """

    head: HeadInputs
    loss_fn: LossFunction
    budget: Budget
    needs: Needs
    gradients: Gradients
    reader: tiled.TileReader

    def run(self, bounds: Sequence[int] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss () and metrics; write the gradients."""
        spans, capacity = self._spans(bounds)
        dtype = accumulation_dtype(self.budget.compute_dtype)
        loss = torch.zeros((), dtype=dtype, device=self.head.hidden.device)
        metrics: dict[str, Tensor] = {}
        shared: tuple[Buffers, Tensor] | None = None
        for span in spans:
            size = span.row_stop - span.row_start
            if size > capacity:
                shared = None  # one oversized group has the whole budget to itself
                memory = self._memory(size)
            else:
                shared = shared or self._memory(capacity)
                memory = shared
            chunk_loss, chunk_metrics = self._chunk(span, *memory)
            loss += chunk_loss
            for name, value in chunk_metrics.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        return loss, metrics

    def _memory(self, num_rows: int) -> tuple[Buffers, Tensor]:
        """Return scratch memory for a chunk, and an empty tensor for its brackets."""
        buffers = self.budget.buffers(num_rows)
        return buffers, buffers.new_brackets()

    def _spans(self, bounds: Sequence[int] | None) -> tuple[list[Span], int]:
        """Return the chunks and the rows of the largest.

        Without a weight to train nothing large is saved, so all groups make one chunk.
        """
        num_rows = self.head.hidden.shape[0]
        if not self.needs.brackets:
            num_groups = num_rows if bounds is None else len(bounds) - 1
            return [Span(0, num_rows, 0, num_groups)], num_rows
        capacity = self.budget.most_saved_rows(num_rows)
        if bounds is None:
            starts = range(0, num_rows, capacity)
            rows = [(start, min(start + capacity, num_rows)) for start in starts]
            spans = [Span(*span, *span) for span in rows]
        else:
            groups = group_chunks(bounds, capacity)
            spans = [Span(bounds[start], bounds[stop], start, stop) for start, stop in groups]
        return spans or [Span(0, 0, 0, 0)], capacity

    def _chunk(
        self, span: Span, buffers: Buffers, brackets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        start, stop = span.row_start, span.row_stop
        rows, saved = self.head.rows(start, stop), tiled.Saved(None, None)
        if self.needs.brackets:
            saved.brackets = brackets[: stop - start]
        if self.needs.only_hidden:
            dtype = accumulation_dtype(rows.hidden.dtype)
            saved.jacobian = torch.empty(rows.hidden.shape, dtype=dtype, device=rows.hidden.device)
        read = tiled.forward(rows, buffers, saved, reader=self.reader)
        loss, metrics, upstream = self._differentiated(read, rows.ignored, span)
        if self.needs.any:
            every = saved.brackets is not None and saved.brackets.shape[0] == stop - start
            if every and saved.brackets is not None and upstream.entropy is not None:
                # An entropy's gradient has every row computed again, so no bracket is read.
                buffers.reuse(saved.brackets)
            gradients = self.gradients.rows(start, stop)
            tiled.backward(rows, buffers, gradients, saved, upstream, self.reader)
        return loss, metrics

    def _differentiated(
        self, read: RowStatistics, ignored: Tensor, span: Span
    ) -> tuple[Tensor, dict[str, Tensor], Upstream]:
        """Return the chunk's loss and metrics, and its derivatives by log-probs and entropies."""
        gradient = self.needs.any
        logprob = read.logprob.requires_grad_(gradient)
        entropy = read.entropy.requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            chunk = TokenChunk(logprob, entropy, read.is_argmax, ~ignored, *span)
            loss, metrics = self.loss_fn(chunk)
        check_scalar(loss)
        by_logprob, by_entropy = torch.zeros_like(read.logprob), None
        if gradient and loss.requires_grad:
            found, by_entropy = torch.autograd.grad(loss, (logprob, entropy), allow_unused=True)
            by_logprob = by_logprob if found is None else found
        detached = {name: value.detach() for name, value in metrics.items()}
        return loss.detach(), detached, Upstream(by_logprob, by_entropy)


def forward(
    call: HeadCall,
    bounds: Sequence[int] | None,
    loss_fn: LossFunction,
    planned_columns: int | None = None,
    reader: tiled.TileReader = tiled.ONE_PROCESS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss () and metrics, with a backward that scales what was computed here.

    Args:
        call: checked arguments.
        bounds: row bounds of the groups on the host; None where every row is its own group.
        loss_fn: loss of a chunk.
        planned_columns: columns that buffers are planned for, if not those of the weight.
        reader: one process, or ranks that share the vocabulary.
    """
    with torch.no_grad(), torch.autocast(call.hidden.device.type, enabled=False):
        budget = call.budget(reread=False, planned_columns=planned_columns)
        gradients = call.new_gradients()
        sweep = Sweep(call.inputs(), loss_fn, budget, call.wanted, gradients, reader)
        loss, metrics = sweep.run(bounds)
    if not call.wanted.any:
        return loss, metrics
    holder = GradientHolder(gradients.all)
    attached: Tensor = GradientInForward.apply(loss, holder, *call.leaves)  # type: ignore[no-untyped-call]
    return attached, metrics
