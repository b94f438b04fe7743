"""One step of each trainer on any device, for the tests that count its reads of that device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastalign.batch.packed import Group
from fastalign.models.load import load_policy
from fastalign.runs.accumulate import measure_examples
from fastalign.runs.config import OptimConfig, TrainConfig
from fastalign.runs.open import make_compute
from fastalign.runs.state import TrainState, make_optimizer, optimiser_step
from fastalign.trainers.dpo.config import LOSSES
from fastalign.trainers.dpo.train import Pairs, dpo_gradient
from fastalign.trainers.ppo.train import one_update
from fastalign.trainers.sft import sft_gradient
from tests.trainers.ppo.ppo_cases import (
    experience_of,
    make_run,
    plain_config,
    rollouts_of,
    state_of,
)

Step = tuple[Callable[[], Any], list[nn.Module]]  # the step, and what lies on the device
# a prompt that is trained on in part, and responses of several lengths
GROUPS = [
    Group(
        [3 + n, 4, 5],
        [[7, 8 + n, 9][: 1 + n % 3], [6] * (2 + n)],
        [[True] * (1 + n % 3), [n % 2 == 0, *[True] * (1 + n)]],
    )
    for n in range(6)
]


def _opened(folder: Path, packing: str, device: str) -> tuple[Any, Any, TrainState]:
    train = TrainConfig(device=device, packing=packing, tokens_per_batch=24)  # type: ignore[arg-type]
    compute = make_compute(train)
    model = load_policy(folder / "llama", compute)
    return compute, model, TrainState(model, make_optimizer(model, OptimConfig()))


def sft_step(folder: Path, packing: str, device: str) -> Step:
    compute, model, state = _opened(folder, packing, device)
    examples = measure_examples(GROUPS, compute.packing)

    def step() -> dict[str, Any]:
        total = sft_gradient(model, examples, range(6), compute)
        update = optimiser_step(state, [total], OptimConfig(), 8)
        return {**total.metrics(), **update}

    return step, [model]


def dpo_step(folder: Path, packing: str, device: str) -> Step:
    compute, model, state = _opened(folder, packing, device)
    reference, ties = torch.zeros(6, 2), torch.tensor([False] * 5 + [True])
    pairs = Pairs(measure_examples(GROUPS, compute.packing), reference, ties)

    def step() -> dict[str, Any]:
        total = dpo_gradient(model, LOSSES["dpo"](), pairs, range(6), compute)
        update = optimiser_step(state, [total], OptimConfig(), 8)
        return {**total.metrics(), **update}

    return step, [model]


def ppo_step(folder: Path, packing: str, device: str) -> Step:
    """One update of PPO with a value model: its rollouts are scored before."""
    config = plain_config(folder)
    run = make_run(config, device=device, packing=packing, tokens_per_batch=60)
    experience, _ = experience_of(run, rollouts_of(run))
    state = state_of(run)
    return lambda: one_update(run, experience, state, [3, 0, 4, 2, 1], 0, 8), [run.models.trained]


STEPS = {"sft": sft_step, "dpo": dpo_step, "ppo": ppo_step}
