"""One optimiser step: micro-batches into one gradient; some steps change no weight."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from fastalign.batch import Group, PackedBatch
from fastalign.data import packed_batches, packed_lengths
from fastalign.models import (
    AttentionChoice,
    Head,
    Packing,
    find_device,
    lm_head,
    predict_hidden,
)
from fastalign.ops import fused_linear_loss
from fastalign.ops.fused_linear_loss import LossFunction
from fastalign.trainers.config import OptimConfig, TrainConfig
from fastalign.trainers.metrics import Metrics
from fastalign.trainers.optimizer import clip_gradient, learning_rate
from fastalign.trainers.process_memory import memory_used_in
from fastalign.trainers.state import TrainState

NUM_NORMS = 128  # of gradients, by which a spike is told
FEWEST_NORMS = 32
# (the batch, which examples it holds) -> the loss's part (), and sums for the metrics
BatchLoss = Callable[[PackedBatch, list[int]], tuple[Tensor, dict[str, Tensor]]]
# (the batch, which examples it holds) -> the loss function, and its groups' bounds
MakeLoss = Callable[[PackedBatch, list[int]], tuple[LossFunction, Sequence[int] | None]]
# (hidden states (N, D), the head, the batch) -> more sums for the metrics
MeasureHidden = Callable[[Tensor, Head, PackedBatch], dict[str, Tensor]]
# (what the run changes, the step's examples, steps of the run) -> metrics, packed tokens computed
TakeStep = Callable[[TrainState, list[int], int], tuple[Metrics, int]]


@dataclass(frozen=True)
class Compute:
    """How forwards are run.

    Attributes:
        device: where.
        dtype: of the matrix products; weights are float32 whatever it is.
        packing: see `predict_hidden`.
        attention: asked for; each model runs what it can of it.
        tokens_per_batch: most packed tokens of a forward.
        max_buffer_bytes: of logits; None: the operation's default.
    """

    device: torch.device
    dtype: torch.dtype
    packing: Packing
    attention: AttentionChoice
    tokens_per_batch: int
    max_buffer_bytes: int | None

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast to the products' dtype, or nothing in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def make_compute(config: TrainConfig) -> Compute:
    """Resolves `auto` settings.

    Raises:
        ValueError: a device that is not there.
    """
    device = find_device(config.device, "train.device")
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return Compute(
        device=device,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        packing=config.packing,
        attention=config.attention,
        tokens_per_batch=config.tokens_per_batch,
        max_buffer_bytes=config.max_buffer_bytes,
    )


@dataclass(frozen=True)
class Examples:
    """Groups, and the packed tokens of each under one packing."""

    groups: Sequence[Group]
    lengths: Sequence[int]


def measure_examples(groups: Sequence[Group], packing: Packing) -> Examples:
    """Counts each group's packed tokens once, for every step to cut its batches by."""
    return Examples(groups, packed_lengths(groups, repeat_prompts=packing != "shared_prefix"))


def policy_loss(
    model: Any,
    make_loss: MakeLoss,
    compute: Compute,
    measure: MeasureHidden | None = None,
    *,
    temperature: float = 1.0,
) -> BatchLoss:
    """The loss of a causal model's log-probs; its backward holds the head's part already.

    `measure` adds sums that only hidden states tell; `temperature` divides the logits.
    """

    def batch_loss(batch: PackedBatch, chosen: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        loss_fn, bounds = make_loss(batch, chosen)
        with compute.autocast():
            hidden = predict_hidden(model, batch, packing=compute.packing)
        head = lm_head(model)
        loss, metrics = fused_linear_loss(
            hidden,
            head.weight,
            batch.targets,
            bounds,
            loss_fn,
            bias=head.bias,
            temperature=temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            lora=head.lora,
            compute_dtype=compute.dtype if compute.dtype != torch.float32 else None,
            max_buffer_bytes=compute.max_buffer_bytes,
        )
        return loss, metrics if measure is None else metrics | measure(hidden.detach(), head, batch)

    return batch_loss


def accumulate(
    examples: Examples,
    indices: Sequence[int],
    batch_loss: BatchLoss,
    compute: Compute,
    *,
    backward: bool,
) -> tuple[float, dict[str, float], int]:
    """Sums losses and metrics over the examples' micro-batches; adds to gradients if `backward`.

    Returns:
        The loss, the metrics' sums, and the packed tokens computed.
    """
    loss = 0.0
    sums: dict[str, float] = {"num_micro_batches": 0}
    num_tokens = 0
    for chosen, on_host in packed_batches(
        examples.groups,
        indices,
        examples.lengths,
        tokens_per_batch=compute.tokens_per_batch,
        share_prompts=compute.packing != "packed",
    ):
        with memory_used_in(f"a batch of {on_host.num_tokens} tokens"):
            batch = on_host.to(compute.device)
            with torch.set_grad_enabled(backward):
                part, metrics = batch_loss(batch, chosen)
            if backward:
                part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
            add_sums(sums, {name: value.item() for name, value in metrics.items()})
        num_tokens += batch.num_tokens
        sums["num_micro_batches"] += 1
    return loss, sums, num_tokens


def add_sums(sums: dict[str, float], more: dict[str, float]) -> None:
    """Adds to summed metrics; of those named `min_...` and `max_...` the extreme stays."""
    for name, value in more.items():
        if name not in sums:
            sums[name] = value
        elif name.startswith(("min_", "max_")):
            sums[name] = (min if name.startswith("min_") else max)(sums[name], value)
        else:
            sums[name] += value


def optimiser_step(
    state: TrainState, loss: float, config: OptimConfig, num_steps: int
) -> dict[str, float | int]:
    """Applies the gradient, unless it or the loss is not finite, or it is a spike.

    The caller counts the step.

    Returns:
        `learning_rate`, `grad_norm` and `skipped` (1 where no weight was changed).
    """
    rate = learning_rate(config, state.step, num_steps)
    norm = float(clip_gradient(state.model, config.grad_clip))
    finite = bool(torch.isfinite(torch.tensor([loss, norm])).all())
    taken = finite and not is_spike(norm, state.grad_norms, config.skip_sigma)
    if taken:
        state.grad_norms = [*state.grad_norms, norm][-NUM_NORMS:]
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return {"learning_rate": rate, "grad_norm": norm, "skipped": int(not taken)}


def is_spike(norm: float, earlier: Sequence[float], sigma: float) -> bool:
    """Whether a norm is `sigma` standard deviations above the mean of the earlier ones.

    With fewer than `FEWEST_NORMS` of them nothing is; nor with a `sigma` of 0.
    """
    if not sigma or len(earlier) < FEWEST_NORMS:
        return False
    return norm > fmean(earlier) + sigma * pstdev(earlier)


def supervised(
    accumulate_step: Callable[[list[int]], tuple[Metrics, int]], config: OptimConfig
) -> TakeStep:
    """The step of an algorithm that computes one gradient of its examples, and applies it.

    Args:
        accumulate_step: adds the gradient of these examples; returns metrics (`loss` and
            `num_micro_batches` among them) and the packed tokens computed.
        config: of the optimiser.
    """

    def take_step(state: TrainState, indices: list[int], num_steps: int) -> tuple[Metrics, int]:
        metrics, num_tokens = accumulate_step(indices)
        update = optimiser_step(state, float(metrics["loss"]), config, num_steps)
        return {**metrics, **update}, num_tokens

    return take_step
