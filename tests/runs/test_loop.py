"""A loop of somebody's own over a run's steps: lines between two steps, an early end, an error."""

import json
import time
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastalign.runs.loop as loop_module
from fastalign.runs.accumulate import measure_examples
from fastalign.runs.best import RunResult
from fastalign.runs.inputs import load_for_training, load_sets
from fastalign.runs.metrics import MetricsWriter
from fastalign.runs.open import open_run
from fastalign.trainers import SFTConfig, train_sft
from fastalign.trainers.sft import sft_gradient
from tests.small_runs import read_metrics, sft_config


def own_loop(
    config: SFTConfig,
    *,
    leave_after: int | None = None,
    fails: tuple[int, str] | None = None,
    error: BaseException | None = None,
) -> RunResult:
    """The loop; in the step and at the place that `fails` names it raises an error."""

    def at(number: int, place: str, step: Any = None) -> None:
        if fails == (number, place):
            if step is not None:
                step.log({"nothing": None})
            raise error or KeyError("of the loop's own")

    with open_run(config, "own") as run:
        model, tokenizer = load_for_training(config, run.compute)
        data, _ = load_sets(config, model, tokenizer)
        examples = measure_examples(data.groups, run.compute.packing)
        run.begin(model, data)
        for step in run.steps():
            torch.rand(3)  # the loop's own dropout, or the like
            at(step.number, "before the gradient")
            total = sft_gradient(model, examples, step.indices, run.compute)
            at(step.number, "before the update")
            metrics = run.optimise(total)
            at(step.number, "amid the updates")
            step.finish(metrics)
            step.log({"half": torch.tensor(step.number / 2, requires_grad=True)})
            at(step.number, "a metric that is no number", step)
            at(step.number, "behind the step")
            if step.number == leave_after:
                break
        return run.end(model, tokenizer)


def same_weights(folder: Path, *runs: str) -> bool:
    first, second = (load_file(folder / run / "model/model.safetensors") for run in runs)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_line_between_two_steps_is_logged_and_changes_no_number(folder: Path) -> None:
    train_sft(sft_config(folder, "straight"))
    assert own_loop(sft_config(folder, "own")).finished
    rows, straight = read_metrics(folder / "own"), read_metrics(folder / "straight")
    assert [row["half"] for row in rows] == [row["step"] / 2 for row in rows]
    assert [row["loss"] for row in rows] == [row["loss"] for row in straight]
    assert same_weights(folder, "own", "straight")


def test_a_loop_that_is_left_is_saved_and_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_loop(sft_config(folder, "straight"))
    result = own_loop(sft_config(folder, "run"), leave_after=3)
    assert (result.step, result.finished, result.exit_code) == (3, False, 0)
    assert "stopped at step 3; saved; go on with --run.resume" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(folder / "run")] == [1, 2, 3]
    assert (folder / "run/checkpoints/step-000003/manifest.json").is_file()
    assert own_loop(sft_config(folder, "run", resume=True)).finished
    assert same_weights(folder, "run", "straight")


@pytest.mark.parametrize(
    ("place", "last"),
    [("before the gradient", 3), ("before the update", 3), ("behind the step", 4)],
)
@pytest.mark.parametrize("error", [KeyError("of the loop's own"), SystemExit(0)], ids=repr)
def test_an_error_leaves_a_checkpoint_of_the_last_whole_step(
    folder: Path, place: str, last: int, error: BaseException
) -> None:
    own_loop(sft_config(folder, "straight", eval_every=0))
    with pytest.raises(type(error), match=f"step {last} is saved, go on with --run.resume"):
        own_loop(sft_config(folder, "run"), fails=(4, place), error=error)
    saved = [path.name for path in (folder / "run/checkpoints").iterdir()]
    assert saved == [f"step-{last:06d}"]
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, last + 1))
    assert own_loop(sft_config(folder, "run", resume=True)).finished
    assert same_weights(folder, "run", "straight")
    rows, straight = read_metrics(folder / "run"), read_metrics(folder / "straight")
    assert [row["loss"] for row in rows] == [row["loss"] for row in straight]


def test_a_metric_that_is_no_number_is_named_and_the_step_is_saved(folder: Path) -> None:
    said = r"metric nothing: expected a number, got None\nstep 4 is saved"
    with pytest.raises(ValueError, match=said):
        own_loop(sft_config(folder, "run"), fails=(4, "a metric that is no number"))
    assert [row["step"] for row in read_metrics(folder / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("save_every", [0, 2])
def test_an_error_amid_the_updates_saves_nothing_of_the_step_and_says_so(
    folder: Path, save_every: int
) -> None:
    kept = "step 2 is saved, go on" if save_every else "nothing is saved"
    said = rf"the error came amid the updates of step 4[:;] {kept}"
    with pytest.raises(KeyError, match=said):
        own_loop(sft_config(folder, "run", save_every=save_every), fails=(4, "amid the updates"))
    saved = [path.name for path in (folder / "run").glob("checkpoints/*")]
    assert saved == (["step-000002"] if save_every else [])
    assert own_loop(sft_config(folder, "run", resume=True)).finished
    assert [row["step"] for row in read_metrics(folder / "run")] == list(range(1, 9))


def test_an_error_in_the_first_step_leaves_a_folder_to_begin_in(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyError, match="no step was taken: nothing is saved"):
        own_loop(sft_config(folder, "run"), fails=(1, "before the gradient"))
    assert own_loop(sft_config(folder, "run", resume=True)).finished
    assert "has no checkpoint yet: the run begins at its first step" in capsys.readouterr().out


def test_a_run_that_never_saved_begins_again_with_its_metrics_moved_aside(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for times, resume in ((1, False), (2, True)):
        with pytest.raises(KeyError):
            own_loop(sft_config(folder, "run"), fails=(2, "amid the updates"))
        with pytest.raises(KeyError):
            own_loop(sft_config(folder, "run", resume=resume), fails=(2, "amid the updates"))
        assert f"its metrics are moved to metrics.jsonl.{2 * times - 1}" in capsys.readouterr().out
    other = sft_config(folder, "run", resume=True)
    other = replace(other, optim=replace(other.optim, lr=0.5))
    with pytest.raises(ValueError, match=r"settings differ from the run's: optim\.lr"):
        own_loop(other)
    own_loop(sft_config(folder, "run"))
    assert [row["step"] for row in read_metrics(folder / "run")] == list(range(1, 9))
    with pytest.raises(ValueError, match="holds another run"):
        own_loop(sft_config(folder, "run"))


def test_a_checkpoint_is_made_when_its_time_has_come(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sft_config(folder, "run").train.save_minutes == 15
    for run, minutes, expected in (("run", 20, [5, 8]), ("never", 0, [8])):
        clock = count(step=240)  # each look at it, once a step
        patched = SimpleNamespace(monotonic=partial(next, clock), perf_counter=time.perf_counter)
        monkeypatch.setattr(loop_module, "time", patched)
        own_loop(sft_config(folder, run, save_minutes=minutes))
        steps = sorted(path.name for path in (folder / run / "checkpoints").iterdir())
        assert steps == [f"step-{step:06d}" for step in expected]


def test_metrics_that_cannot_be_written_are_held_and_written_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, calls = MetricsWriter.require_written, 0

    def full(self: MetricsWriter) -> None:
        nonlocal calls
        calls += 1
        if 2 <= calls <= until:
            raise OSError("metrics.jsonl: No space left on device")
        plain(self)

    monkeypatch.setattr(MetricsWriter, "require_written", full)
    until = 4
    assert own_loop(sft_config(folder, "short")).finished
    assert [row["step"] for row in read_metrics(folder / "short")] == list(range(1, 9))
    assert capsys.readouterr().out.count("the lines are held, and tried again") == 1
    calls, until = 0, 99
    with pytest.raises(OSError, match="No space left on device"):
        own_loop(sft_config(folder, "run", save_every=3))
    assert read_metrics(folder / "run") == []
    monkeypatch.setattr(MetricsWriter, "require_written", plain)
    assert own_loop(sft_config(folder, "run", resume=True)).finished
    rows, straight = read_metrics(folder / "run"), read_metrics(folder / "short")
    assert [row["loss"] for row in rows] == [row["loss"] for row in straight]
