"""The state of a run: what a checkpoint must hold, and the optimiser step that changes it."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import nn

from fastalign.runs.accumulate import Total, read_totals
from fastalign.runs.config import OptimConfig, States

NUM_NORMS = 128  # gradient norms that a spike is compared with
FEWEST_NORMS = 32


@dataclass
class TrainState:
    """The moving parts of a run.

    Attributes:
        model: the policy, float32 master weights.
        optimizer: its optimiser.
        step: optimiser steps taken, skipped ones included.
        num_skipped_in_a_row: latest steps that were skipped as non-finite.
        num_tokens: packed tokens computed so far.
        kept: an algorithm's own numbers, by name; a checkpoint holds them to the last bit.
        grad_norms: gradient norms of the latest steps that were applied, oldest first.
        rollouts: completions that were begun for the next step, as JSON holds them.
        reference: weights of a reference that is renewed as the run goes, by the model's names;
            empty where there is none.
        whole: False from a step's first update until the step is counted; a checkpoint of what is
            between them would be of no step.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    step: int = 0
    num_skipped_in_a_row: int = 0
    num_tokens: int = 0
    kept: dict[str, float] = field(default_factory=dict)
    grad_norms: list[float] = field(default_factory=list)
    rollouts: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, torch.Tensor] = field(default_factory=dict)
    whole: bool = True

    def counters(self) -> dict[str, Any]:
        """Return the counters, as JSON holds them."""
        names = ("step", "num_skipped_in_a_row", "num_tokens", "kept", "grad_norms")
        return {name: getattr(self, name) for name in names}


def trainable_parameters(model: Any) -> dict[str, torch.Tensor]:
    """Return the parameters that a run trains, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators."""
    random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, torch.Tensor]:
    """Return the states of torch's generators, as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """Restore the states that `random_state` returned, or a part of them."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def adamw(states: States) -> Any:
    """Return the optimiser's class for this precision of its averages.

    `8bit` (arXiv 2110.02861) keeps a byte for each, and a float32 scale for each 256 of them;
    tensors of fewer than 4,096 elements stay float32. An update is computed in float32.

    Raises:
        ValueError: if bitsandbytes is needed and not installed.
    """
    if states == "float32":
        return partial(torch.optim.AdamW, fused=True)  # one pass in place of a dozen
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "optim.states: 8bit needs bitsandbytes: pip install 'fastalign[low-bit]'"
        ) from error
    return AdamW8bit


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Make AdamW (arXiv 1711.05101) over the trainable parameters; only matrices decay.

    A parameter with an attribute `lr_scale` has that many times the learning rate.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            key = (decay, getattr(parameter, "lr_scale", 1.0))
            groups.setdefault(key, []).append(parameter)
    optimizer: torch.optim.Optimizer = adamw(config.states)(
        [
            {"params": parameters, "weight_decay": decay, "lr_scale": scale}
            for (decay, scale), parameters in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )
    return optimizer


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of step `step` (from 0) of `num_steps`; there is no state to save.

    It warms up linearly over `warmup_steps` and reaches the peak at their last step; then it is
    constant, or falls towards zero, which it would reach one step after the last.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradient(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Clip the gradient to `max_norm`; return its global norm () before clipping.

    If the model has an attribute `clipped_apart`, each of those lists of parameters is clipped by
    its own norm, so that a value model far from its targets does not take the policy's step. A
    non-finite gradient gives a non-finite norm.
    """
    norms = []
    for part in getattr(model, "clipped_apart", (model.parameters(),)):
        parameters = [p for p in part if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        norms.append(norm)
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def clipped_norm(model: nn.Module, config: OptimConfig, totals: Sequence[Total]) -> float:
    """Clip the gradient; return its norm, read in one copy with the step's sums."""
    (norm,) = read_totals(totals, clip_gradient(model, config.grad_clip))
    return norm


def optimiser_step(
    state: TrainState, totals: Sequence[Total], config: OptimConfig, num_steps: int
) -> dict[str, float | int]:
    """Clip the gradient and `apply_gradient`; the loss is the sum of those of `totals`."""
    norm = clipped_norm(state.model, config, totals)
    return apply_gradient(state, sum(total.loss for total in totals), norm, config, num_steps)


def apply_gradient(
    state: TrainState, loss: float, norm: float, config: OptimConfig, num_steps: int
) -> dict[str, float | int]:
    """Apply the clipped gradient, unless it or the loss is not finite, or it is a spike.

    The caller counts the step.

    Args:
        state: the run's state.
        loss: the step's loss.
        norm: the gradient's norm before clipping.
        config: settings of the optimiser.
        num_steps: optimiser steps of the whole run.

    Returns:
        `learning_rate`, `grad_norm` and `skipped` (1 where no weight was changed).
    """
    rate = learning_rate(config, state.step, num_steps)
    finite = math.isfinite(loss) and math.isfinite(norm)
    taken = finite and not is_spike(norm, state.grad_norms, config.skip_sigma)
    if taken:
        state.grad_norms = [*state.grad_norms, norm][-NUM_NORMS:]
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return {"learning_rate": rate, "grad_norm": norm, "skipped": int(not taken)}


def is_spike(norm: float, earlier: Sequence[float], sigma: float) -> bool:
    """Return whether a norm is more than `sigma` standard deviations above the earlier ones' mean.

    With fewer than `FEWEST_NORMS` earlier norms, or a `sigma` of 0, no norm is a spike.
    """
    if not sigma or len(earlier) < FEWEST_NORMS:
        return False
    return norm > fmean(earlier) + sigma * pstdev(earlier)
