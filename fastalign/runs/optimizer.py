"""AdamW, the learning rate as a function of the step, and the gradient's norm."""

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from fastalign.runs.config import OptimConfig, States


def adamw(states: States) -> Any:
    """The class of the optimiser that keeps its averages so.

    `8bit` (arXiv 2110.02861) keeps a byte for each, and a float32 scale for each 256 of them;
    tensors of fewer than 4,096 elements stay float32. An update is computed in float32.

    Raises:
        ValueError: bitsandbytes is not installed.
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
    """AdamW (arXiv 1711.05101) over the trainable parameters; matrices alone decay.

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
    """The learning rate of step `step` (counted from 0) of `num_steps`: no state to save.

    Linear warm-up over `warmup_steps`, reaching the peak at its last step; then constant, or from
    the peak towards zero, which would be reached one step after the last.
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
    """The norm of the whole gradient before clipping, (); scales the gradient where it is larger.

    A model with an attribute `clipped_apart` has each of these parts scaled by its own norm, so
    that a value model far from its targets does not take the policy's step. A non-finite gradient
    gives a non-finite norm.
    """
    norms = []
    for part in getattr(model, "clipped_apart", (model,)):
        parameters = [p for p in part.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        norms.append(norm)
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()
