"""A run that goes on from any of its steps ends with the same bits, on one rank and on two.

Four steps of seven examples of twelve: two ends of an epoch are inside of steps. The steps are cut
into several batches, so gradients accumulate, and on ranks some have more of them than others.
What fastalign draws has seeds of its own; a reward of the user's draws from torch's generator, of
which a checkpoint holds the state.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastalign.ranks.config import ParallelConfig
from fastalign.trainers.sampling.config import SamplesConfig
from tests import rank_processes as ranks
from tests.ranks.test_ranks import DDP, FSDP, TRAINERS, lora
from tests.runs.test_resume import MEASURED
from tests.small_runs import read_metrics, scored_with_noise, taught

NUM_STEPS = 4
STEPS = {"max_steps": NUM_STEPS, "batch_size": 7, "tokens_per_batch": 40}
SAMPLING = ("ppo", "online-dpo")
ALONE = [(name, None, None) for name in TRAINERS] + [
    ("dpo", None, lora),
    ("sft", None, taught),
    ("online-dpo", None, scored_with_noise),
]
SHARED = [
    ("online-dpo", DDP, scored_with_noise),
    ("sft", DDP, None),
    ("sft", FSDP, taught),
    ("dpo", DDP, lora),
    ("dpo", FSDP, lora),
    ("reward", FSDP, None),
    ("ppo", FSDP, None),
    ("online-dpo", FSDP, None),
]


def config_of(trainer: str, folder: Path, run: str, change: Any, **train: Any) -> Any:
    config = TRAINERS[trainer][0](folder, run, **STEPS, **train)
    if trainer in SAMPLING:
        config = replace(config, samples=SamplesConfig(every=2))
    return config if change is None else change(config)


def as_it_was(straight: Path, run: Path, step: int) -> None:
    """The run's folder as it was when that step had been saved, and the next ones logged."""
    shutil.copytree(straight, run)
    for path in (*run.glob("model"), *run.glob("value"), *run.glob("adapter"), *run.glob("eval")):
        shutil.rmtree(path)
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


def tensors_below(folder: Path) -> dict[str, list[torch.Tensor]]:
    """Each tensor's parts; which rank writes one that all hold is left to chance."""
    found: dict[str, list[torch.Tensor]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, value in load_file(path).items():
            found.setdefault(name, []).append(value)
    return found


def assert_same_end(straight: Path, run: Path) -> None:
    rows = [
        [{k: v for k, v in row.items() if k not in MEASURED and "time/" not in k} for row in each]
        for each in (read_metrics(straight), read_metrics(run))
    ]
    assert rows[0] == rows[1]
    last = f"checkpoints/step-{NUM_STEPS:06d}"
    states = [json.loads((path / last / "state.json").read_text()) for path in (straight, run)]
    assert states[0].pop("metrics_bytes") > 0
    assert states[1].pop("metrics_bytes") > 0
    assert states[0] == states[1]
    samples = [path / "samples.jsonl" for path in (straight, run)]
    assert samples[0].exists() == samples[1].exists() == ("samples_bytes" in states[0])
    if samples[0].exists():  # with the checkpoint's rows, and those of later steps once
        assert samples[0].read_bytes() == samples[1].read_bytes() != b""
    for part in (last, "model", "value", "adapter"):
        first, second = tensors_below(straight / part), tensors_below(run / part)
        assert first.keys() == second.keys()
        for name, values in first.items():
            assert all(map(torch.equal, values, second[name])), name


def train(
    trainer: str, parallel: ParallelConfig | None, folder: Path, configs: Sequence[Any]
) -> None:
    """Run the configurations one after the other, in one process or in two ranks."""
    call = TRAINERS[trainer][1]
    if parallel is None:
        assert all(call(config).finished for config in configs)
    else:
        shared = [replace(config, parallel=parallel) for config in configs]
        ranks.run(2, folder / "logs", ranks.in_turn, call, shared)


@pytest.mark.parametrize(("trainer", "parallel", "change"), [*ALONE, *SHARED])
def test_every_step_is_one_to_go_on_from(
    folder: Path, trainer: str, parallel: ParallelConfig | None, change: Any
) -> None:
    keep = {"save_every": 1, "keep_checkpoints": NUM_STEPS}
    config = config_of(trainer, folder, "straight", change, **keep)
    train(trainer, parallel, folder, [config])
    runs = [folder / f"from-{step}" for step in range(1, NUM_STEPS)]
    for step, run in enumerate(runs, 1):
        as_it_was(folder / "straight", run, step)
    resumed = [config_of(trainer, folder, r.name, change, **keep, resume=True) for r in runs]
    train(trainer, parallel, folder, resumed)
    for run in runs:
        assert_same_end(folder / "straight", run)
