"""A loop of somebody's own over a run's steps: lines between two steps, an early end, an error."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastalign.runs.accumulate import measure_examples
from fastalign.runs.data import load_sets
from fastalign.runs.load_models import load_for_training
from fastalign.runs.loop import RunResult
from fastalign.runs.open import open_run
from fastalign.trainers import SFTConfig, train_sft
from fastalign.trainers.sft import sft_gradient
from tests.small_runs import read_metrics, sft_config


def own_loop(
    config: SFTConfig, *, leave_after: int | None = None, fail_after: int | None = None
) -> RunResult:
    with open_run(config, "own") as run:
        model, tokenizer = load_for_training(config, run.compute)
        data, _ = load_sets(config, model, tokenizer)
        examples = measure_examples(data.groups, run.compute.packing)
        run.begin(model, data)
        for step in run.steps():
            step.finish(run.optimise(sft_gradient(model, examples, step.indices, run.compute)))
            step.log({"half": step.number / 2})
            if step.number == leave_after:
                break
            if step.number == fail_after:
                raise KeyError("of the loop's own")
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


def test_an_error_in_the_loop_leaves_whole_lines_and_frees_the_folder(folder: Path) -> None:
    with pytest.raises(KeyError, match="of the loop's own"):
        own_loop(sft_config(folder, "run", save_every=1), fail_after=3)
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert own_loop(sft_config(folder, "run", save_every=1, resume=True)).finished
