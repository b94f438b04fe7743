"""A gradient that is a spike is not applied."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastalign.runs.accumulate import Total
from fastalign.runs.config import OptimConfig
from fastalign.runs.state import TrainState, is_spike, make_optimizer, optimiser_step
from fastalign.trainers import sft as sft_module
from fastalign.trainers import train_sft
from tests.small_runs import read_metrics, sft_config


def test_what_a_spike_is_by_hand() -> None:
    earlier = [1.0, 3.0] * 16  # mean 2, standard deviation 1
    assert not is_spike(7.9, earlier, 6.0)
    assert is_spike(8.1, earlier, 6.0)
    assert not is_spike(8.1, earlier, 0.0)
    assert not is_spike(8.1, earlier[:31], 6.0)


def test_a_spike_changes_no_weight_and_is_not_among_the_norms_that_judge_the_next() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    config = OptimConfig(lr=1e-3, grad_clip=1.0, skip_sigma=6.0)
    state = TrainState(model, make_optimizer(model, config))

    def step(scale: float) -> dict[str, float | int]:
        (scale * model(torch.randn(8, 4)).square().mean()).backward()
        found = optimiser_step(state, [Total(1.0)], config, 1000)
        state.step += 1
        return found

    for _ in range(140):
        assert step(1.0)["skipped"] == 0
    assert len(state.grad_norms) == 128
    before, norms = model.weight.clone(), list(state.grad_norms)
    assert step(1e4)["skipped"] == 1
    assert torch.equal(model.weight, before)
    assert state.grad_norms == norms
    assert step(1.0)["skipped"] == 0
    assert not torch.equal(model.weight, before)


def test_a_resumed_run_knows_the_norms_before_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def config(**train: Any) -> Any:
        made = sft_config(folder, "run", max_steps=36, **train)
        return replace(made, optim=replace(made.optim, skip_sigma=8.0))

    train_sft(config(stop_at_step=34))
    num_targets, calls = sft_module.num_targets, []

    def spike_first(*arguments: Any) -> Any:
        calls.append(1)
        return num_targets(*arguments) * (1e-4 if len(calls) == 1 else 1)

    monkeypatch.setattr(sft_module, "num_targets", spike_first)
    train_sft(config(resume=True))
    assert [row["skipped"] for row in read_metrics(folder / "run")] == [0] * 34 + [1, 0]
    assert "step 35 skipped" in capsys.readouterr().out
