"""Everything that a run changes as it goes: what a checkpoint must hold."""

import random
from dataclasses import dataclass, field
from typing import Any

import torch


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

    def counters(self) -> dict[str, Any]:
        """Return the counters, as JSON holds them."""
        return {
            "step": self.step,
            "num_skipped_in_a_row": self.num_skipped_in_a_row,
            "num_tokens": self.num_tokens,
            "kept": self.kept,
            "grad_norms": self.grad_norms,
        }


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
