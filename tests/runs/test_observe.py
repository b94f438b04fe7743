"""A trace of one step, the stacks of a stalled one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastalign.trainers import sft as sft_module
from fastalign.trainers import train_sft
from tests.small_runs import sft_config


def test_a_trace_of_the_step_that_was_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_sft(sft_config(folder, "run", max_steps=3, profile=2))
    traces = list((folder / "run/profile").iterdir())
    assert [path.name for path in traces] == ["step-000002.json"]
    names = {event.get("name") for event in json.loads(traces[0].read_text())["traceEvents"]}
    assert "aten::mm" in names
    assert f"trace of step 2 written to {traces[0]}" in capsys.readouterr().out


def test_a_stalled_step_leaves_its_stacks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gradient, calls = sft_module.sft_gradient, []
    stalls = folder / "run/stalls.txt"

    def held_up(*arguments: Any) -> Any:
        calls.append(1)
        while len(calls) == 2 and b"in held_up" not in stalls.read_bytes():
            pass  # until this stack is written
        return gradient(*arguments)

    monkeypatch.setattr(sft_module, "sft_gradient", held_up)
    train_sft(sft_config(folder, "run", max_steps=3, stall_seconds=0.5))
    stacks = stalls.read_text()
    assert "most recent call last" in stacks
    assert "in held_up" in stacks
    said = capsys.readouterr().out
    assert "step 2 took more than 0.5 seconds; the stacks of all threads are in" in said


def test_a_run_that_does_not_stall_leaves_no_file(folder: Path) -> None:
    train_sft(sft_config(folder, "run", max_steps=2))
    assert not (folder / "run/stalls.txt").exists()
    assert not (folder / "run/profile").exists()


def test_what_is_observed_may_change_when_a_run_is_resumed(folder: Path) -> None:
    train_sft(sft_config(folder, "run", stop_at_step=2))
    config = sft_config(folder, "run", resume=True)
    train_sft(replace(config, train=replace(config.train, profile=3, stall_seconds=9.0)))
    assert (folder / "run/profile/step-000003.json").is_file()


def test_a_negative_time_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.stall_seconds: expected at least 0, got -1"):
        sft_config(folder, "run", stall_seconds=-1.0)
