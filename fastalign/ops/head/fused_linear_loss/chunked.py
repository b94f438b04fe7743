"""The loss and its gradient in one sweep over chunks of whole groups.

For each chunk: log-probs, then `loss_fn` under autograd on that small vector, which gives the
coefficient of each token's log-prob, then the gradient products. The weight's product of a call's
only chunk waits for the backward.

Legend: T rows, V vocabulary, D hidden, G groups, n rows of a chunk.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.head import tiled
from fastalign.ops.head.buffers import TILE_ROWS_MULTIPLE, Budget, Buffers
from fastalign.ops.head.call import HeadCall
from fastalign.ops.head.fused_linear_loss.chunk import LossFunction, TokenChunk, check_scalar
from fastalign.ops.head.head_tile import RowStatistics, Upstream
from fastalign.ops.head.operands import Gradients, HeadInputs, Needs
from fastalign.ops.head.products import accumulation_dtype, operand


class SummedGradients:
    """Gradients of several chunks, which the forward added up."""

    def __init__(self, call: HeadCall, gradients: Gradients) -> None:
        self._call, self._gradients = call, gradients

    def scaled(self, scale: Tensor, *_: Tensor | None) -> list[Tensor | None]:
        """Return the gradients times `scale` (), each in its leaf's dtype."""
        return self._gradients.results(self._call.leaves, scale)


class WaitingGradients:
    """The gradients of one chunk, once the loss's own gradient is known.

    It multiplies rows of D, as the coefficients do, and the weight's gradient is one product,
    written in the weight's dtype. Until then the brackets are held.

    Attributes:
        call: the call's arguments.
        ignored: (T,) bool.
        brackets: (T, V) brackets of every row, or None where the weight is not trained.
        rows: bracket @ W.
        by_logprob: (T,) derivatives of the loss by the log-probs.
    """

    def __init__(
        self,
        call: HeadCall,
        ignored: Tensor,
        brackets: Tensor | None,
        rows: tiled.RowJacobians,
        by_logprob: Tensor,
    ) -> None:
        self.call, self.ignored, self.brackets = call, ignored, brackets
        self.rows, self.by_logprob = rows, by_logprob

    def scaled(
        self, scale: Tensor, hidden: Tensor, lora_hidden: Tensor | None
    ) -> list[Tensor | None]:
        """Return the gradients times `scale` (), each in its leaf's dtype."""
        gradients = self.call.new_gradients(single=True)
        coefficient = (self.by_logprob * scale).masked_fill_(self.ignored, 0.0)
        self.rows.write(gradients, coefficient, self.ignored)
        if self.brackets is not None:
            dtype = self.call.compute_dtype
            low = None if lora_hidden is None else operand(lora_hidden, dtype)
            rows = (operand(hidden, dtype), low)
            tiled.add_weight_products(self.brackets, rows, self.ignored, gradients, coefficient)
        return gradients.results(self.call.leaves)


class LossWithGradient(torch.autograd.Function):
    """Give the loss the backward that `holder` waits for, or has computed."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        loss: Tensor,
        holder: SummedGradients | WaitingGradients,
        *leaves: Tensor | None,
    ) -> Tensor:
        """Return the loss as a function of the leaves."""
        hidden, _, _, lora_hidden, _ = leaves
        ctx.holder = holder  # type: ignore[attr-defined]
        rows = (hidden, lora_hidden)  # which the backward multiplies
        ctx.save_for_backward(*rows)  # type: ignore[arg-type]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_loss: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients times the upstream one, each in its leaf's dtype."""
        holder, ctx.holder = ctx.holder, None  # type: ignore[attr-defined]
        if holder is None:
            raise RuntimeError(
                "fused_linear_loss computes its gradient once, and has handed it on: call the "
                "function again to go backward a second time"
            )
        with torch.autocast(grad_loss.device.type, enabled=False):
            gradients = holder.scaled(grad_loss, *ctx.saved_tensors)  # type: ignore[attr-defined]
        return (None, None, *gradients)


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


def balanced_capacity(bounds: Sequence[int], capacity: int) -> int:
    """Return the fewest rows to a chunk that make no more chunks than `capacity` does.

    A chunk as large as can be leaves room for the lowest tiles only; chunks of equal size have
    higher ones. Chunks of single rows are of whole blocks, where those fit.
    """

    def count(rows: int) -> int:
        return sum(1 for _ in group_chunks(bounds, rows))

    single_rows = isinstance(bounds, range) and bounds.step == 1
    sizes = () if single_rows else (stop - start for start, stop in pairwise(bounds))
    low = max([1, *(size for size in sizes if size <= capacity)])
    high, num_chunks = capacity, count(capacity)
    while low < high:
        middle = (low + high) // 2
        if count(middle) <= num_chunks:
            high = middle
        else:
            low = middle + 1
    return min(capacity, low + -low % TILE_ROWS_MULTIPLE) if single_rows else low


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
        call: the call's arguments.
        head: operands, of all rows.
        loss_fn: loss of a chunk.
        budget: sizes of the buffers.
        reader: one process, or ranks that share the vocabulary.
    """

    call: HeadCall
    head: HeadInputs
    loss_fn: LossFunction
    budget: Budget
    reader: tiled.TileReader

    def run(
        self, bounds: Sequence[int] | None
    ) -> tuple[Tensor, dict[str, Tensor], SummedGradients | WaitingGradients | None]:
        """Return the loss (), metrics, and what the backward returns the wanted gradients from."""
        spans, capacity = self._spans(bounds)
        dtype = accumulation_dtype(self.budget.compute_dtype)
        loss = torch.zeros((), dtype=dtype, device=self.head.hidden.device)
        metrics: dict[str, Tensor] = {}
        shared: tuple[Buffers, Tensor] | None = None
        gradients: Gradients | None = None
        for span in spans:
            size = span.row_stop - span.row_start
            if size > capacity:
                shared = None  # one oversized group has the whole budget to itself
                memory = self._memory(size)
            else:
                shared = shared or self._memory(capacity)
                memory = shared
            chunk_loss, chunk_metrics, saved, upstream = self._read(span, *memory)
            loss += chunk_loss
            for name, value in chunk_metrics.items():
                metrics[name] = metrics[name] + value if name in metrics else value
            if not self.needs.any:
                continue
            if len(spans) == 1 and saved.holds_all(size) and upstream.entropy is None:
                return loss, metrics, self._waiting(saved, upstream)
            gradients = gradients or self.call.new_gradients(single=False)
            self._add_gradients(span, memory[0], saved, upstream, gradients)
        holder = None if gradients is None else SummedGradients(self.call, gradients)
        return loss, metrics, holder

    @property
    def needs(self) -> Needs:
        """Which gradients are wanted."""
        return self.call.wanted

    def _memory(self, num_rows: int) -> tuple[Buffers, Tensor]:
        """Return scratch memory for a chunk, and an empty tensor for its brackets."""
        buffers = self.budget.buffers(num_rows)
        return buffers, buffers.new_brackets()

    def _spans(self, bounds: Sequence[int] | None) -> tuple[list[Span], int]:
        """Return the chunks and the rows of the largest.

        Without a weight to train nothing large is saved, so all groups make one chunk.
        """
        num_rows = self.head.hidden.shape[0]
        bounds = range(num_rows + 1) if bounds is None else bounds
        if not self.needs.brackets:
            return [Span(0, num_rows, 0, len(bounds) - 1)], num_rows
        capacity = balanced_capacity(bounds, self.budget.most_saved_rows(num_rows))
        groups = group_chunks(bounds, capacity)
        spans = [Span(bounds[start], bounds[stop], start, stop) for start, stop in groups]
        return spans or [Span(0, 0, 0, 0)], capacity

    def _read(
        self, span: Span, buffers: Buffers, brackets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], tiled.Saved, Upstream]:
        """Return a chunk's loss and metrics, and what its gradients are made from."""
        start, stop = span.row_start, span.row_stop
        rows, saved = self.head.rows(start, stop), tiled.Saved(None, None)
        if self.needs.brackets:
            saved.brackets = brackets[: stop - start]
        if self.needs.only_hidden:
            dtype = accumulation_dtype(rows.hidden.dtype)
            saved.jacobian = torch.empty(rows.hidden.shape, dtype=dtype, device=rows.hidden.device)
        read = tiled.forward(rows, buffers, saved, reader=self.reader)
        loss, metrics, upstream = self._differentiated(read, rows.ignored, span)
        return loss, metrics, saved, upstream

    def _waiting(self, saved: tiled.Saved, upstream: Upstream) -> WaitingGradients:
        """Return the gradients of one chunk of all rows, whose brackets are saved."""
        head, brackets = self.head, saved.brackets
        if brackets is None:
            rows = tiled.RowJacobians(saved.jacobian, None, [])
        else:
            rows = tiled.row_jacobians(brackets, head, self.needs, self.reader)
        assert upstream.logprob is not None
        return WaitingGradients(self.call, head.ignored, brackets, rows, upstream.logprob)

    def _add_gradients(
        self,
        span: Span,
        buffers: Buffers,
        saved: tiled.Saved,
        upstream: Upstream,
        gradients: Gradients,
    ) -> None:
        """Write a chunk's rows of the gradients, and add to those of weights."""
        start, stop = span.row_start, span.row_stop
        every = saved.brackets is not None and saved.holds_all(stop - start)
        if every and saved.brackets is not None and upstream.entropy is not None:
            # An entropy's gradient has every row computed again, so no bracket is read.
            buffers.reuse(saved.brackets)
        rows, of_rows = self.head.rows(start, stop), gradients.rows(start, stop)
        tiled.backward(rows, buffers, of_rows, saved, upstream, self.reader)

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
    """Return the loss () and metrics, with a backward of what was computed here.

    Args:
        call: checked arguments.
        bounds: row bounds of the groups on the host; None where every row is its own group.
        loss_fn: loss of a chunk.
        planned_columns: columns that buffers are planned for, if not those of the weight.
        reader: one process, or ranks that share the vocabulary.
    """
    with torch.no_grad(), torch.autocast(call.hidden.device.type, enabled=False):
        budget = call.budget(reread=False, planned_columns=planned_columns)
        sweep = Sweep(call, call.inputs(), loss_fn, budget, reader)
        loss, metrics, holder = sweep.run(bounds)
    if holder is None:
        return loss, metrics
    attached: Tensor = LossWithGradient.apply(loss, holder, *call.leaves)  # type: ignore[no-untyped-call]
    return attached, metrics
