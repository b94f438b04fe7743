"""The memory of a run before it is started: the real forward and backward on tensors without data.

The model is built on fake tensors, runs the run's own largest batch, and PyTorch's memory tracker
follows what is alive; so whatever an architecture keeps is counted, and no weight is read.
"""

from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.hooks import RemovableHandle

from fastalign.batch.packed import PackedBatch
from fastalign.compute import Compute
from fastalign.models import attention_of, hidden_at
from fastalign.models.attention import ATTENTIONS, AttentionPlan
from fastalign.ops.head.buffers import default_budget

# AdamW's two averages in float32.
BYTES_OF_STATES = 8
# bitsandbytes: a byte for each of two averages and a float32 scale for each 256 of them.
BYTES_OF_8BIT_STATES = 2 + 2 * 4 / 256
SMALLEST_8BIT_TENSOR = 4096


@dataclass(frozen=True)
class Peak:
    """Bytes alive at the fullest moment of a phase.

    Attributes:
        weights: parameters and buffers, frozen ones included.
        gradients: of the trained parameters.
        states: the optimiser's.
        activations: kept for the backward, the head's buffers, and whatever else is alive.
        buckets: DDP's copy of gradients.
        gathered: FSDP2's whole weights beside the parts, at most.
        reducing: FSDP2's whole gradients on their way to the parts, at most.
        saving: the copy that a checkpoint is written from while training goes on.
    """

    weights: int
    gradients: int
    states: int
    activations: int
    buckets: int = 0
    gathered: int = 0
    reducing: int = 0
    saving: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


class _Head(torch.autograd.Function):
    """Allocates what `fused_linear_loss` does; its kernels cannot run on tensors without data."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, buffer_bytes: int) -> Tensor:
        scratch = torch.empty(buffer_bytes, dtype=torch.uint8, device=hidden.device)
        ctx.of_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        ctx.of_weight = torch.empty_like(weight) if weight.requires_grad else None
        del scratch
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return ctx.of_hidden, ctx.of_weight, None


def buffer_bytes(weight: Tensor, num_rows: int, compute: Compute) -> int:
    """What the head's logits take at a time: within the budget, and no more than there are."""
    most = compute.max_buffer_bytes
    if most is None:
        most = default_budget(weight.shape[0], compute.dtype, compute.device)
    return min(most, num_rows * weight.shape[0] * 4)


def states_bytes(model: Any, states: str) -> int:
    """Of AdamW's two averages of every trained parameter."""
    total = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            small = states == "float32" or parameter.numel() < SMALLEST_8BIT_TENSOR
            total += parameter.numel() * (BYTES_OF_STATES if small else BYTES_OF_8BIT_STATES)
    return int(total)


def fake_mode(device: torch.device) -> ExitStack:
    """In it, tensors on the device have shapes and no data."""
    stack = ExitStack()
    stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    stack.enter_context(torch.device(device))
    return stack


def peak_of_step(
    model: Any, batch: PackedBatch, compute: Compute, *, states: str, several: bool
) -> Peak:
    """The fullest moment of a forward and backward of the policy or reward model.

    Args:
        model: on fake tensors.
        batch: real, on the device: the largest one of the run.
        compute: how forwards are run.
        states: `float32` or `8bit`.
        several: whether a step has several batches, so that gradients are there from the start.
    """
    return _peak(model, batch, compute, states_bytes(model, states), 2 if several else 1)


def peak_of_forward(model: Any, batch: PackedBatch, compute: Compute) -> Peak:
    """The fullest moment of a forward without gradients: a reference's, or an evaluation's."""
    return _peak(model, batch, compute, 0, 0)


def _peak(model: Any, batch: PackedBatch, compute: Compute, states: int, backwards: int) -> Peak:
    plan = AttentionPlan(batch)
    name = attention_of(model)
    if name in ATTENTIONS:
        plan.prepare(name)
    head = model.get_output_embeddings()
    scratch = 0 if head is None else buffer_bytes(head.weight, batch.num_targets, compute)
    positions = batch.predict_index if head is not None else batch.response_bounds[:, 1] - 1
    with fake_mode(compute.device):
        tracker = MemTracker()
        for parameter in model.parameters():
            if not parameter.requires_grad:  # it would hook these too, which torch refuses
                nothing = RemovableHandle(OrderedDict())
                tracker._param_to_grad_hook_handles[parameter] = (nothing, nothing)
        tracker.track_external(model)
        with tracker:
            for _ in range(max(backwards, 1)):
                with torch.set_grad_enabled(backwards > 0):
                    hidden = hidden_at(model, batch, positions, compute, plan)
                    weight = model.score.weight if head is None else head.weight
                    loss = _Head.apply(hidden, weight, scratch)  # type: ignore[no-untyped-call]
                    del hidden
                    if backwards:
                        loss.backward()
                    del loss
                tracker.reset_mod_stats()
        snapshot = tracker.get_tracker_snapshot("peak")
    model.zero_grad(set_to_none=True)  # as a step does: what is asked next begins without
    (kinds,) = (v for device, v in snapshot.items() if device.type == compute.device.type)
    found = {getattr(kind, "name", str(kind)): size for kind, size in kinds.items()}
    return Peak(
        weights=found["PARAM"] + found["BUFFER"],
        gradients=found["GRAD"],
        states=states,
        activations=found["ACT"] + found["TEMP"] + found["OTH"],
    )
