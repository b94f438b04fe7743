"""One optimiser step: the policy's loss, and a gradient applied; some steps change no weight."""

import time
from collections.abc import Callable, Sequence
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import PackedBatch
from fastalign.compute import Compute
from fastalign.models import lm_head, predict_hidden
from fastalign.ops import LinearHead, fused_linear_loss
from fastalign.ops.head.fused_linear_loss import LossFunction
from fastalign.runs.accumulate import BatchLoss
from fastalign.runs.config import OptimConfig
from fastalign.runs.metrics import Metrics
from fastalign.runs.optimizer import clip_gradient, learning_rate
from fastalign.runs.state import TrainState

NUM_NORMS = 128  # of gradients, by which a spike is told
FEWEST_NORMS = 32
# (the batch, which examples it holds) -> the loss function, and its groups' bounds
MakeLoss = Callable[[PackedBatch, list[int]], tuple[LossFunction, Sequence[int] | None]]
# (hidden states (N, D), the head, the batch) -> more sums for the metrics
MeasureHidden = Callable[[Tensor, LinearHead, PackedBatch], dict[str, Tensor]]
# (what the run changes, the step's examples, steps of the run) -> metrics, packed tokens computed
TakeStep = Callable[[TrainState, list[int], int], tuple[Metrics, int]]


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

    def of_batch(batch: PackedBatch, chosen: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        loss_fn, bounds = make_loss(batch, chosen)
        hidden = predict_hidden(model, batch, compute)
        head = lm_head(model)
        loss, metrics = fused_linear_loss(
            hidden,
            head,
            batch.targets,
            bounds,
            loss_fn,
            temperature=temperature,
            compute_dtype=compute.product_dtype,
            max_buffer_bytes=compute.max_buffer_bytes,
        )
        return loss, metrics if measure is None else metrics | measure(hidden.detach(), head, batch)

    return BatchLoss(model, of_batch)


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
        start = time.perf_counter()
        metrics, num_tokens = accumulate_step(indices)
        computed = time.perf_counter()
        update = optimiser_step(state, float(metrics["loss"]), config, num_steps)
        seconds = {
            "time/gradient_seconds": computed - start,
            "time/optimizer_seconds": time.perf_counter() - computed,
        }
        return {**metrics, **update, **seconds}, num_tokens

    return take_step
