"""One gradient of many examples: micro-batches, shared by the ranks, added up."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastalign.batch.packed import Group, PackedBatch
from fastalign.batch.schedule import packed_batches, packed_lengths
from fastalign.choices import Packing
from fastalign.compute import Compute, memory_used_in
from fastalign.models.forward import hidden_and_head
from fastalign.models.router import add_router_loss
from fastalign.ops import LinearHead, fused_linear_loss
from fastalign.ops.head.fused_linear_loss import LossFunction
from fastalign.ops.head.products import weights_rounded_once
from fastalign.progress import advance, phase
from fastalign.ranks.parallel import enter
from fastalign.runs.metrics import Metrics, mean_metrics

# (a micro-batch, the examples that it holds) -> its part of the loss (), sums for the metrics
BatchLoss = Callable[[PackedBatch, list[int]], tuple[Tensor, dict[str, Tensor]]]
# Examples that are cut into batches together in an evaluation: bounds the work, not the result.
PIECE = 1024


@dataclass(frozen=True)
class Examples:
    """Groups, and the number of packed tokens of each under one packing."""

    groups: Sequence[Group]
    lengths: Sequence[int]

    def first(self) -> "Examples":
        """Return the first example alone."""
        return Examples([self.groups[0]], [self.lengths[0]])


def measure_examples(groups: Sequence[Group], packing: Packing) -> Examples:
    """Count each group's packed tokens once, for every step to cut its batches by."""
    return Examples(groups, packed_lengths(groups, packing))


class Part(NamedTuple):
    """Sums of one micro-batch, on the device."""

    loss: Tensor  # ()
    sums: dict[str, Tensor]  # each ()
    num_tokens: int


class Total:
    """Sums over the micro-batches of all ranks.

    Those of a run of one process stay on the device until `loss` or `sums` is asked for, or until
    `read_totals` reads them with other numbers, so that a step waits for its GPU once.

    Attributes:
        num_tokens: packed tokens computed.
    """

    def __init__(
        self, loss: float = 0.0, sums: dict[str, float] | None = None, num_tokens: int = 0
    ) -> None:
        self._loss = loss
        self._sums: dict[str, float] = {"num_micro_batches": 0} if sums is None else sums
        self.num_tokens = num_tokens
        self._parts: list[Part] = []

    def append(self, part: Part) -> None:
        """Add a micro-batch, whose numbers are read later."""
        self._parts.append(part)
        self.num_tokens += part.num_tokens

    @property
    def loss(self) -> float:
        """The loss."""
        read_totals([self])
        return self._loss

    @loss.setter
    def loss(self, value: float) -> None:
        """Replace the loss."""
        read_totals([self])
        self._loss = value

    @property
    def sums(self) -> dict[str, float]:
        """Sums that the metrics are made of, and `num_micro_batches`."""
        read_totals([self])
        return self._sums

    def add(self, other: "Total") -> None:
        """Add other sums to these, in place."""
        self._loss = self.loss + other.loss
        add_sums(self._sums, other.sums)
        self.num_tokens += other.num_tokens

    def metrics(self) -> Metrics:
        """Return `loss`, and the sums as means."""
        return {"loss": self.loss, **mean_metrics(self.sums)}


def read_totals(totals: Sequence[Total], *more: Tensor) -> list[float]:
    """Read what `totals` still have on the device, in one copy with the numbers in `more`.

    Args:
        totals: sums, which have their numbers afterwards.
        more: further tensors ().

    Returns:
        The numbers of `more`.
    """
    parts = [(total, part) for total in totals for part in total._parts]
    waiting = [value for _, part in parts for value in (part.loss, *part.sums.values())]
    numbers = iter(read_numbers([*waiting, *more]))
    for total, part in parts:
        total._loss += next(numbers)
        sums = {name: next(numbers) for name in part.sums} | {"num_micro_batches": 1}
        add_sums(total._sums, sums)
    for total in totals:
        total._parts = []
    return list(numbers)


def read_numbers(values: Sequence[Tensor]) -> list[float]:
    """Return tensors () as Python's numbers, integers as such: one copy for each device."""
    by_device: dict[torch.device, dict[torch.dtype, list[int]]] = {}
    whole = [value.full_tensor() if isinstance(value, DTensor) else value for value in values]
    for place, value in enumerate(whole):
        by_device.setdefault(value.device, {}).setdefault(value.dtype, []).append(place)
    found: list[float] = [0.0] * len(values)
    for by_dtype in by_device.values():
        # stacked by dtype, for a common one could be too narrow
        stacks = [
            torch.stack([whole[p].reshape(()) for p in places]) for places in by_dtype.values()
        ]
        numbers = torch.cat([stack.double() for stack in stacks]).tolist()
        for place, number in zip(chain.from_iterable(by_dtype.values()), numbers, strict=True):
            kept = whole[place].is_floating_point()
            found[place] = number if kept else int(number)
    return found


def accumulate(
    model: Any,
    batch_loss: BatchLoss,
    examples: Examples,
    indices: Sequence[int],
    compute: Compute,
    *,
    backward: bool = True,
    last: bool = True,
) -> Total:
    """Sum a loss over examples, and add its gradient to the model's.

    The examples are cut into micro-batches, which the ranks share. Afterwards every rank has the
    same sums and gradients.

    `batch_loss` divides by the count of the whole step, so that the result does not depend on how
    the step is cut. `last`: no more is added to the gradients before they are used. With `backward`
    a router's loss is added, of each micro-batch by its share of the step's packed tokens. A
    `progress.phase` that is open is advanced by the examples.
    """
    total = Total()
    pieces = list(packed_batches(examples.groups, indices, examples.lengths, compute))
    num_tokens = sum(examples.lengths[i] for i in indices)
    with weights_rounded_once() if len(pieces) > 1 else nullcontext():
        for piece in pieces:
            with memory_used_in(f"a batch of {piece.batch.num_tokens} tokens"):
                batch = piece.batch.to(compute.device)
                # The ranks sum their gradients once, in the step's last backward.
                sync = compute.syncs_each_batch or (last and piece is pieces[-1])
                share = sum(examples.lengths[i] for i in piece.indices) / num_tokens
                with torch.set_grad_enabled(backward):
                    part, sums = loss_of_batch(
                        model, batch_loss, batch, piece.indices, sync, share if backward else 0.0
                    )
                if backward:
                    # A rank without work computes a batch of another's, and adds nothing by it.
                    part = part if piece.counts else part * 0
                    part.backward()  # type: ignore[no-untyped-call]
                if piece.counts:
                    total.append(Part(part.detach(), sums, batch.num_tokens))
                    advance(len(piece.indices) * compute.world.size)
    if compute.world.size == 1:
        return total
    read_totals([total])
    of_ranks = Total(sums={})
    for of_rank in compute.world.gather(total):  # in the ranks' order: all get the same bits
        of_ranks.add(of_rank)
    return of_ranks


def loss_of_batch(
    model: Any,
    batch_loss: BatchLoss,
    batch: PackedBatch,
    indices: list[int],
    sync: bool,
    share: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a micro-batch's loss inside of the model's forward, where DDP and FSDP2 hook in.

    Of a router's loss `share` is added.
    """

    def computation() -> tuple[Tensor, dict[str, Tensor]]:
        if not share:
            return batch_loss(batch, indices)
        return add_router_loss(model, batch, share, lambda: batch_loss(batch, indices))

    return enter(model, computation, sync=sync)


def evaluate_by_loss(
    model: Any, batch_loss: BatchLoss, examples: Examples, compute: Compute
) -> Metrics:
    """Return metrics named `eval_...` of all the examples, without gradients."""
    total = Total(sums={})
    with phase("evaluation", len(examples.groups), "examples"):
        for start in range(0, len(examples.groups), PIECE):
            indices = range(start, min(start + PIECE, len(examples.groups)))
            total.add(accumulate(model, batch_loss, examples, indices, compute, backward=False))
    return {f"eval_{name}": value for name, value in total.metrics().items()}


def add_sums(sums: dict[str, float], more: dict[str, float]) -> None:
    """Add to summed metrics in place; for `min_...` and `max_...` the extreme is taken."""
    for name, value in more.items():
        if name not in sums:
            sums[name] = value
        elif name.startswith(("min_", "max_")):
            sums[name] = (min if name.startswith("min_") else max)(sums[name], value)
        else:
            sums[name] += value


class PolicyLoss(NamedTuple):
    """A fused loss of one micro-batch, and what it was computed from."""

    loss: Tensor  # (); its backward already holds the head's part
    sums: dict[str, Tensor]  # for the metrics
    hidden: Tensor  # (N, D) hidden states that predict the batch's targets, detached
    head: LinearHead


def policy_loss(
    policy: Any,
    batch: PackedBatch,
    loss_fn: LossFunction,
    compute: Compute,
    *,
    segments: Sequence[int] | None = None,
    temperature: float = 1.0,
    states: tuple[Tensor, LinearHead] | None = None,
) -> PolicyLoss:
    """Run the policy on a micro-batch and compute a fused loss of its targets' log-probs.

    `loss_fn` is of a chunk's log-probs and entropies, see `fused_linear_loss`; `segments` are
    bounds of targets that must stay together in a chunk (None: any may be split); `states` are
    `hidden_and_head` of the batch, if the caller computes more from them.
    """
    hidden, head = hidden_and_head(policy, batch, compute) if states is None else states
    loss, sums = fused_linear_loss(
        hidden,
        head,
        batch.targets,
        segments,
        loss_fn,
        temperature=temperature,
        compute_dtype=compute.product_dtype,
        max_buffer_bytes=compute.max_buffer_bytes,
    )
    return PolicyLoss(loss, sums, hidden.detach(), head)
