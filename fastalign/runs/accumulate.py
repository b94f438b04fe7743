"""One gradient of many examples: micro-batches, shared by the ranks, added up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import Group, PackedBatch
from fastalign.batch.schedule import packed_batches, packed_lengths
from fastalign.compute import Compute, Packing
from fastalign.ranks.parallel import enter
from fastalign.runs.memory import memory_used_in
from fastalign.runs.metrics import Metrics, mean_metrics


@dataclass(frozen=True)
class BatchLoss:
    """A loss of micro-batches.

    Attributes:
        model: whose gradient its backward adds to.
        of_batch: (the batch, which examples it holds) -> the loss's part (), sums for the metrics.
    """

    model: Any
    of_batch: Callable[[PackedBatch, list[int]], tuple[Tensor, dict[str, Tensor]]]

    def __call__(
        self, batch: PackedBatch, chosen: list[int], *, sync: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of one micro-batch; `sync`: see `enter`."""
        return enter(self.model, lambda: self.of_batch(batch, chosen), sync=sync)


@dataclass(frozen=True)
class Examples:
    """Groups, and the packed tokens of each under one packing."""

    groups: Sequence[Group]
    lengths: Sequence[int]


def measure_examples(groups: Sequence[Group], packing: Packing) -> Examples:
    """Counts each group's packed tokens once, for every step to cut its batches by."""
    return Examples(groups, packed_lengths(groups, packing))


def accumulate(
    examples: Examples,
    indices: Sequence[int],
    batch_loss: BatchLoss,
    compute: Compute,
    *,
    backward: bool,
    last: bool = True,
) -> tuple[float, dict[str, float], int]:
    """Sums losses and metrics over the examples' micro-batches; adds to gradients if `backward`.

    Several ranks share the micro-batches, and have the same sums and gradients afterwards.

    Args:
        examples: all there are.
        indices: which of them.
        batch_loss: of a micro-batch.
        compute: how forwards are run.
        backward: add to the model's gradients.
        last: whether no more is added to them before they are used.

    Returns:
        The loss, the metrics' sums, and the packed tokens computed.
    """
    total = Total()
    pieces = list(packed_batches(examples.groups, indices, examples.lengths, compute))
    for piece in pieces:
        with memory_used_in(f"a batch of {piece.batch.num_tokens} tokens"):
            batch = piece.batch.to(compute.device)
            sync = compute.syncs_each_batch or (last and piece is pieces[-1])
            with torch.set_grad_enabled(backward):
                part, metrics = batch_loss(batch, piece.indices, sync=sync)
            if backward:
                part = part if piece.counts else part * 0
                part.backward()  # type: ignore[no-untyped-call]
            if piece.counts:
                total.add(part.item(), {k: v.item() for k, v in metrics.items()}, batch.num_tokens)
    return total_of_ranks(compute.world.gather(total))


@dataclass
class Total:
    """Sums over micro-batches: the loss, what the metrics are made of, and packed tokens."""

    loss: float = 0.0
    sums: dict[str, float] = field(default_factory=lambda: {"num_micro_batches": 0})
    num_tokens: int = 0

    def add(self, loss: float, sums: dict[str, float], num_tokens: int) -> None:
        """Adds one batch's."""
        self.loss += loss
        add_sums(self.sums, sums)
        self.sums["num_micro_batches"] += 1
        self.num_tokens += num_tokens


def total_of_ranks(totals: Sequence[Total]) -> tuple[float, dict[str, float], int]:
    """The sums over ranks, in their order, so that all get the same bits."""
    sums: dict[str, float] = {}
    for total in totals:
        add_sums(sums, total.sums)
    return sum(t.loss for t in totals), sums, sum(t.num_tokens for t in totals)


def add_sums(sums: dict[str, float], more: dict[str, float]) -> None:
    """Adds to summed metrics; of those named `min_...` and `max_...` the extreme stays."""
    for name, value in more.items():
        if name not in sums:
            sums[name] = value
        elif name.startswith(("min_", "max_")):
            sums[name] = (min if name.startswith("min_") else max)(sums[name], value)
        else:
            sums[name] += value


# Examples that are cut into batches together; bounds the work of cutting, not the result.
PIECE = 1024


def evaluate_by_loss(examples: Examples, batch_loss: BatchLoss, compute: Compute) -> Metrics:
    """Metrics named `eval_...` of all the examples; `batch_loss` divides by their whole count."""
    loss = 0.0
    sums: dict[str, float] = {}
    for start in range(0, len(examples.groups), PIECE):
        indices = range(start, min(start + PIECE, len(examples.groups)))
        part, part_sums, _ = accumulate(examples, indices, batch_loss, compute, backward=False)
        loss += part
        add_sums(sums, part_sums)
    return {f"eval_{name}": value for name, value in ({"loss": loss} | mean_metrics(sums)).items()}
