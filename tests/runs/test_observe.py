"""A trace of one step, the stacks of a stalled one, requests to stop."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastalign.runs import observe
from fastalign.runs.observe import stop_on_signal
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


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", observe.EXIT_CODES)
def test_a_second_request_within_two_seconds_is_the_same(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(observe.time, "monotonic", lambda: now)
    reached: list[int] = []
    before = signal.signal(number, lambda *_: reached.append(1))
    try:
        with stop_on_signal() as request:
            send(number)
            now += 1.9
            send(number)
            send(signal.SIGTERM)
            assert (request.received, reached) == (number, [])
            now += 0.2
            send(number)
            assert request.insisted is (number != signal.SIGXCPU)
            assert reached == ([] if number == signal.SIGXCPU else [1])
    finally:
        signal.signal(number, before)


def test_a_request_is_said_at_once_by_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(observe.sys, "stderr", terminal)
        for speaks in (True, False):
            with stop_on_signal(speaks=speaks):
                send(signal.SIGINT)
    with os.fdopen(reader, "rb") as said:
        assert said.read() == b"\nstopping after this step and saving; again: stop now\n"


def test_a_hangup_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_on_signal() as request:
            send(signal.SIGHUP)
            assert request.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
