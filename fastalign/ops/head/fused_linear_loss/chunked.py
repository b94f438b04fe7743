"""The loss and its gradient in one sweep over chunks of whole groups.

For each chunk: log-probs, then `loss_fn` under autograd on that small vector, which gives the
coefficient of each token's log-prob, then the gradient products.

Legend: T rows, V vocabulary, D hidden, G groups.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops.head.buffers import Buffers, Plan, plan_buffers
from fastalign.ops.head.fused_linear_loss.chunk import LossFunction, TokenChunk, check_scalar
from fastalign.ops.head.fused_linear_loss.holder import GradientHolder, GradientInForward
from fastalign.ops.head.head_tile import RowStatistics
from fastalign.ops.head.linear_logprob import chunked
from fastalign.ops.head.linear_logprob.operands import Gradients, HeadInputs, Needs, new_gradients
from fastalign.ops.head.linear_logprob.passes import HeadPasses
from fastalign.ops.head.products import accumulation_dtype


@dataclass(frozen=True)
class Budget:
    """What decides the buffers' sizes, all but the number of rows."""

    num_columns: int
    compute_dtype: torch.dtype
    device: torch.device
    max_buffer_bytes: int
    needs: Needs
    backend: str

    def plan(self, num_rows: int) -> Plan:
        """The buffers for a chunk of `num_rows`."""
        return plan_buffers(
            num_rows,
            self.num_columns,
            self.compute_dtype,
            self.device.type,
            self.max_buffer_bytes,
            scratch=self.backend == "torch",
            keep=self.needs.kept,
            convert=self.needs.any,
        )

    def buffers(self, num_rows: int) -> tuple[Buffers, Tensor]:
        """Scratch memory for a chunk, and a place for its brackets."""
        plan = self.plan(num_rows)
        buffers = Buffers(plan, self.num_columns, self.compute_dtype, self.device, self.backend)
        return buffers, buffers.new_kept(plan.kept_rows)

    def rows_kept_whole(self, most: int) -> int:
        """The largest chunk, of at most `most` rows, whose brackets can all be kept; at least 1."""
        low, high = 1, max(most, 1)
        while low < high:
            middle = (low + high + 1) // 2
            if self.plan(middle).kept_rows >= middle:
                low = middle
            else:
                high = middle - 1
        return low


def group_chunks(bounds: Sequence[int], capacity: int) -> Iterator[tuple[int, int]]:
    """Spans of consecutive groups with at most `capacity` rows; a larger group comes alone."""
    num_groups = len(bounds) - 1
    start = 0
    while start < num_groups:
        # the last bound within reach; groups without rows at the border go along
        stop = bisect_right(bounds, bounds[start] + capacity) - 1
        stop = max(min(stop, num_groups), start + 1)
        yield start, stop
        start = stop


def forward(
    head: HeadInputs,
    bounds: Sequence[int] | None,
    loss_fn: LossFunction,
    budget: Budget,
    leaves: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    passes: HeadPasses = chunked,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss () and metrics, with a backward that scales what was computed here.

    Args:
        head: The operands.
        bounds: Row bounds of the groups on the host; None where every row is its own group.
        loss_fn: The loss of a chunk.
        budget: Sizes of the buffers.
        leaves: hidden, weight, bias and LoRA's operands, as autograd knows them.
        passes: What projects a chunk and takes its gradients.
    """
    with torch.no_grad(), torch.autocast(head.hidden.device.type, enabled=False):
        hidden, weight, _, lora_hidden, lora_weight = leaves
        gradients = new_gradients(
            budget.needs, hidden, weight, lora_hidden, lora_weight, budget.compute_dtype
        )
        loss, metrics = _sweep(head, bounds, loss_fn, budget, gradients, passes)
    if not budget.needs.any:
        return loss, metrics
    holder = GradientHolder(gradients.all)
    attached: Tensor = GradientInForward.apply(loss, holder, *leaves)  # type: ignore[no-untyped-call]
    return attached, metrics


def _sweep(
    head: HeadInputs,
    bounds: Sequence[int] | None,
    loss_fn: LossFunction,
    budget: Budget,
    gradients: Gradients,
    passes: HeadPasses,
) -> tuple[Tensor, dict[str, Tensor]]:
    num_rows = head.hidden.shape[0]
    spans, capacity = _spans(num_rows, bounds, budget)
    loss = torch.zeros(
        (), dtype=accumulation_dtype(budget.compute_dtype), device=head.hidden.device
    )
    metrics: dict[str, Tensor] = {}
    shared: tuple[Buffers, Tensor] | None = None
    for span in spans:
        size = span[1] - span[0]
        if size > capacity:
            shared = None  # one oversized group has the whole budget to itself
            memory = budget.buffers(size)
        else:
            shared = shared or budget.buffers(capacity)
            memory = shared
        arguments = (loss_fn, budget.needs, memory, gradients, passes)
        chunk_loss, chunk_metrics = _chunk(head, span, *arguments)
        loss += chunk_loss
        for name, value in chunk_metrics.items():
            metrics[name] = metrics[name] + value if name in metrics else value
    return loss, metrics


def _spans(
    num_rows: int, bounds: Sequence[int] | None, budget: Budget
) -> tuple[list[tuple[int, int, int, int]], int]:
    """(row_start, row_stop, group_start, group_stop) of each chunk, and the rows of the largest.

    Without a weight to train nothing large is kept, so all groups make one chunk.
    """
    num_groups = num_rows if bounds is None else len(bounds) - 1
    if not budget.needs.kept:
        return [(0, num_rows, 0, num_groups)], num_rows
    capacity = budget.rows_kept_whole(num_rows)
    if bounds is None:
        starts = range(0, num_rows, capacity)
        spans = [(s, min(s + capacity, num_rows), s, min(s + capacity, num_rows)) for s in starts]
    else:
        spans = [(bounds[a], bounds[b], a, b) for a, b in group_chunks(bounds, capacity)]
    return spans or [(0, 0, 0, 0)], capacity


def _chunk(
    head: HeadInputs,
    span: tuple[int, int, int, int],
    loss_fn: LossFunction,
    needs: Needs,
    memory: tuple[Buffers, Tensor],
    gradients: Gradients,
    passes: HeadPasses,
) -> tuple[Tensor, dict[str, Tensor]]:
    start, stop = span[0], span[1]
    rows = head.rows(start, stop)
    buffers, place = memory
    kept = place[: stop - start] if needs.kept else None
    direction = None
    if needs.direction:
        dtype = accumulation_dtype(rows.hidden.dtype)
        direction = torch.empty(rows.hidden.shape, dtype=dtype, device=rows.hidden.device)
    read = passes.forward(rows, buffers, kept=kept, direction=direction)
    loss, metrics, coefficients = _differentiated(loss_fn, read, rows.ignored, span, needs.any)
    if needs.any:
        if kept is not None and kept.shape[0] == stop - start and coefficients[1] is not None:
            buffers.lend(kept)  # an entropy's gradient has every row computed again
        passes.backward(
            rows,
            buffers,
            gradients.rows(start, stop),
            coefficients[0],
            grad_entropy=coefficients[1],
            kept=kept,
            direction=direction,
        )
    return loss, metrics


def _differentiated(
    loss_fn: LossFunction,
    read: RowStatistics,
    ignored: Tensor,
    span: tuple[int, int, int, int],
    gradient: bool,
) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor | None]]:
    """The chunk's loss and metrics, and its derivatives by each log-prob and entropy."""
    logprob = read.logprob.requires_grad_(gradient)
    entropy = read.entropy.requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        loss, metrics = loss_fn(TokenChunk(logprob, entropy, read.is_argmax, ~ignored, *span))
    check_scalar(loss)
    by_logprob, by_entropy = torch.zeros_like(read.logprob), None
    if gradient and loss.requires_grad:
        found, by_entropy = torch.autograd.grad(loss, (logprob, entropy), allow_unused=True)
        by_logprob = by_logprob if found is None else found
    detached = {name: value.detach() for name, value in metrics.items()}
    return loss.detach(), detached, (by_logprob, by_entropy)
