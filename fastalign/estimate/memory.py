"""A run's models on fake tensors, and the peak memory of their forward and backward passes.

The model processes the run's largest batch on tensors without data while a tracker follows the
allocations. No weights are read, and any architecture is counted correctly.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastalign.batch.packed import PackedBatch
from fastalign.compute import Compute
from fastalign.estimate.tracker import BUFFER, GRADIENT, OTHER, PARAMETER, PeakTracker
from fastalign.models.attention import attention_name
from fastalign.models.attention.choice import ATTENTIONS
from fastalign.models.attention.plan import AttentionPlan
from fastalign.models.forward import hidden_at
from fastalign.models.load import model_without_weights
from fastalign.models.lora import linear_names
from fastalign.ops.head.buffers import default_budget
from fastalign.runs.config import TrainingConfig
from fastalign.runs.inputs import (
    add_new_adapter,
    base_dtype,
    begins_with_adapter,
    checkpoint_activations,
    keep_start,
)
from fastalign.trainers.reward.config import RewardConfig

# AdamW's two moments in float32.
BYTES_OF_STATES = 8
# bitsandbytes: one byte for each of two moments and a float32 scale per 256 of them.
BYTES_OF_8BIT_STATES = 2 + 2 * 4 / 256
SMALLEST_8BIT_TENSOR = 4096
# A weight in bitsandbytes' doubly quantised NF4: half a byte, one byte of scale per 64 weights, and
# a float32 per 256 scales.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


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


def is_rounded_once(weight: Tensor, compute: Compute) -> bool:
    """Return True if a step of several batches keeps the head in the products' dtype.

    Weights that FSDP2 gathers are in that dtype already.
    """
    return weight.dtype != compute.dtype and compute.parallel.strategy != "fsdp"


def states_bytes(model: Any, states: str) -> int:
    """Return the bytes of AdamW's two moments of every trained parameter."""
    total = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            small = states == "float32" or parameter.numel() < SMALLEST_8BIT_TENSOR
            total += parameter.numel() * (BYTES_OF_STATES if small else BYTES_OF_8BIT_STATES)
    return int(total)


@cache
def _only_mode() -> FakeTensorMode:
    """Return the mode of all fake tensors.

    To another mode they would be foreign: it gives each weight that it meets a second storage, as
    which a transposed one that a layer saves for its backward would be counted beside the weight.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_mode(device: torch.device) -> ExitStack:
    """Return a context in which tensors on the device have shapes but no data."""
    stack = ExitStack()
    stack.enter_context(_only_mode())
    stack.enter_context(torch.device(device))
    return stack


def peak_of(
    model: Any,
    batch: PackedBatch,
    compute: Compute,
    *,
    backwards: int = 0,
    logits_bytes: int | None = None,
) -> Peak:
    """Return the peak of a forward pass, or of that many forward and backward passes of a step.

    The model is on fake tensors, the batch is a real one; from the second pass on gradients already
    exist. Optimiser states are not counted. `logits_bytes` are those of the head's buffers, if they
    are not `buffer_bytes`.
    """
    plan = AttentionPlan(batch)
    name = attention_name(model)
    if name in ATTENTIONS:
        plan.prepare(name)
    head = model.get_output_embeddings()
    scratch = 0 if head is None else buffer_bytes(head.weight, batch.num_targets, compute)
    scratch = scratch if logits_bytes is None else logits_bytes
    positions = batch.predict_index if head is not None else batch.response_bounds[:, 1] - 1
    with fake_mode(compute.device), PeakTracker(model, compute.device) as tracker:
        rounded = None
        if backwards > 1 and head is not None and is_rounded_once(head.weight, compute):
            rounded = torch.empty_like(head.weight, dtype=compute.dtype, requires_grad=False)
        for _ in range(max(backwards, 1)):
            with torch.set_grad_enabled(backwards > 0):
                hidden = hidden_at(model, batch, positions, compute, plan)
                weight = model.score.weight if head is None else head.weight
                loss = _Head.apply(hidden, weight, scratch)  # type: ignore[no-untyped-call]
                del hidden
                if backwards:
                    loss.backward()
                del loss
        del rounded
    model.zero_grad(set_to_none=True)  # as a step does: the next peak begins without gradients
    return Peak(
        weights=tracker.peak[PARAMETER] + tracker.peak[BUFFER],
        gradients=tracker.peak[GRADIENT],
        activations=tracker.peak[OTHER],
    )


def trained_model(config: TrainingConfig, compute: Compute) -> Any:
    """Return the trained model with its adapter, NF4 weights in the dtype of their products."""
    dtype = base_dtype(config.model, compute)
    model = fake_model(config, compute, config.model.path, dtype, trained=True)
    if config.train.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def fake_model(
    config: TrainingConfig, compute: Compute, path: str, stored: torch.dtype, *, trained: bool
) -> Any:
    """Return a model of the run on fake tensors, with the new adapter if it is trained.

    Its dtype is the stored one, or that of the products if it is sharded.
    """
    dtype = compute.dtype if compute.parallel.strategy == "fsdp" else stored
    with torch.device("meta"):  # peft moves its matrices, which fake tensors do not support
        model = model_without_weights(
            path,
            compute,
            reward=isinstance(config, RewardConfig),
            dtype=dtype,
            trust_remote_code=config.model.trust_remote_code,
            keep_adapter=trained and begins_with_adapter(config.model),
        )
        if trained and begins_with_adapter(config.model):
            keep_start(model, config.model)
        elif trained:
            add_new_adapter(model, config.model)
    move_to_fake(model, compute.device)
    return model


def move_to_fake(model: nn.Module, device: torch.device) -> None:
    """Replace parameters and buffers by fake tensors on a device; tied ones stay tied."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in model.modules():
        for name, parameter in part.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((part, name))
    with fake_mode(device):
        model.to_empty(device=device)
    for (first, name), *others in owners.values():
        for part, its_name in others:
            setattr(part, its_name, getattr(first, name))


def weight_bytes(model: Any, config: TrainingConfig) -> int:
    """Return the bytes of the trained model's parameters and buffers as they will be stored."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    total = float(sum(t.numel() * t.element_size() for t in tensors.values()))
    if config.model.lora.base == "nf4":
        head = model.get_output_embeddings()
        for layer in linear_names(model).values():
            weight: Any = layer.weight
            if (head is None or weight is not head.weight) and not weight.requires_grad:
                total -= weight.numel() * (weight.element_size() - NF4_BYTES)
    return int(total)
