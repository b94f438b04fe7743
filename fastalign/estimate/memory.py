"""Peak memory of a forward and backward pass, run on fake tensors.

The model processes the run's largest batch on tensors without data while PyTorch's memory tracker
follows the allocations. No weights are read, and any architecture is counted correctly.
"""

from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.hooks import RemovableHandle

from fastalign.batch.packed import PackedBatch
from fastalign.compute import Compute
from fastalign.models import attention_name, hidden_at
from fastalign.models.attention import ATTENTIONS, AttentionPlan
from fastalign.ops.head.buffers import default_budget

# AdamW's two moments in float32.
BYTES_OF_STATES = 8
# bitsandbytes: one byte for each of two moments and a float32 scale per 256 of them.
BYTES_OF_8BIT_STATES = 2 + 2 * 4 / 256
SMALLEST_8BIT_TENSOR = 4096


@dataclass(frozen=True)
class Peak:
    """Bytes on a device at the peak of a phase, or (without the last four) between computations.

    Attributes:
        weights: parameters and buffers, frozen ones included.
        gradients: gradients of the trained parameters, whole ones with `parallel.no_sync`.
        states: optimiser states.
        buckets: DDP's copy of the gradients.
        activations: tensors saved for the backward pass, the head's buffers and temporaries.
        gathered: upper bound of FSDP2's gathered weights beside the shards.
        reducing: upper bound of FSDP2's whole gradients before they are reduced.
        saving: copy that an asynchronous checkpoint is written from.
    """

    weights: int
    gradients: int = 0
    states: int = 0
    buckets: int = 0
    activations: int = 0
    gathered: int = 0
    reducing: int = 0
    saving: int = 0

    @property
    def total(self) -> int:
        """Sum of all of them."""
        return sum(vars(self).values())


class _Head(torch.autograd.Function):
    """Allocate as `fused_linear_loss` does, whose kernels cannot run on fake tensors."""

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
    """Return the bytes of logits held at a time: all of them, or the budget."""
    most = compute.max_buffer_bytes
    if most is None:
        most = default_budget(weight.shape[0], compute.dtype, compute.device)
    return min(most, num_rows * weight.shape[0] * 4)


def states_bytes(model: Any, states: str) -> int:
    """Return the bytes of AdamW's two moments of every trained parameter."""
    total = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            small = states == "float32" or parameter.numel() < SMALLEST_8BIT_TENSOR
            total += parameter.numel() * (BYTES_OF_STATES if small else BYTES_OF_8BIT_STATES)
    return int(total)


def fake_mode(device: torch.device) -> ExitStack:
    """Return a context in which tensors on the device have shapes but no data."""
    stack = ExitStack()
    stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    stack.enter_context(torch.device(device))
    return stack


def peak_of_step(
    model: Any, batch: PackedBatch, compute: Compute, *, states: str, several: bool
) -> Peak:
    """Return the peak of a forward and backward pass of the trained model.

    The model is on fake tensors, the batch is a real one; with `several` batches in a step
    gradients already exist.
    """
    peak = _peak(model, batch, compute, 2 if several else 1)
    return replace(peak, states=states_bytes(model, states))


def peak_of_forward(model: Any, batch: PackedBatch, compute: Compute) -> Peak:
    """Return the peak of a forward pass without gradients: a reference's or an evaluation's."""
    return _peak(model, batch, compute, 0)


def _peak(model: Any, batch: PackedBatch, compute: Compute, backwards: int) -> Peak:
    plan = AttentionPlan(batch)
    name = attention_name(model)
    if name in ATTENTIONS:
        plan.prepare(name)
    head = model.get_output_embeddings()
    scratch = 0 if head is None else buffer_bytes(head.weight, batch.num_targets, compute)
    positions = batch.predict_index if head is not None else batch.response_bounds[:, 1] - 1
    with fake_mode(compute.device):
        tracker = MemTracker()
        for parameter in model.parameters():
            if not parameter.requires_grad:  # MemTracker would hook these too, which torch refuses
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
    model.zero_grad(set_to_none=True)  # as a step does: the next peak begins without gradients
    (kinds,) = (v for device, v in snapshot.items() if device.type == compute.device.type)
    found = {getattr(kind, "name", str(kind)): size for kind, size in kinds.items()}
    return Peak(
        weights=found["PARAM"] + found["BUFFER"],
        gradients=found["GRAD"],
        activations=found["ACT"] + found["TEMP"] + found["OTH"],
    )
