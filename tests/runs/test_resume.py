"""N steps equal k steps, a stop, a resume and N - k steps, to the last bit."""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastalign.models.load import save_model
from fastalign.runs import folder as run_folder
from fastalign.runs.checkpoint.writer import list_checkpoints
from fastalign.trainers import train_dpo, train_ppo, train_sft
from tests.small_runs import (
    WORDS,
    MakeConfig,
    dpo_config,
    ppo_config,
    read_metrics,
    saved_tensors,
    sft_config,
    write_rows,
)
from tests.tiny import tiny_model
from tests.tokenizers import CHATML, make_tokenizer

POLICIES = [
    pytest.param(sft_config, train_sft, id="sft"),
    pytest.param(dpo_config, train_dpo, id="dpo"),
]
BOTH = pytest.mark.parametrize(("make", "train"), POLICIES)
PPO = pytest.param(ppo_config, train_ppo, id="ppo")
# One that trains on rows and one that samples; the others, from every step: test_resume_everywhere.
EACH = pytest.mark.parametrize(("make", "train"), [POLICIES[1], PPO])
MEASURED = ("step_seconds", "tokens_per_second", "peak_memory_bytes", "eps")


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k not in MEASURED and "time/" not in k}
        for row in read_metrics(folder)
    ]


def assert_same_run(first: Path, second: Path, apart_from: Sequence[str] = ()) -> None:
    rows = [
        [{k: v for k, v in row.items() if k not in apart_from} for row in numbers(folder)]
        for folder in (first, second)
    ]
    assert rows[0] == rows[1]
    for part in ("model", "value") if (first / "value").exists() else ("model",):
        weights = [load_file(run / part / "model.safetensors") for run in (first, second)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    checkpoints = [run / "checkpoints/step-000008" for run in (first, second)]
    states = [json.loads((path / "state.json").read_text()) for path in checkpoints]
    assert states[0]["optimizer"] == states[1]["optimizer"]
    assert states[0]["tensors"] == states[1]["tensors"]
    tensors = [saved_tensors(path) for path in checkpoints]
    assert sorted(tensors[0]) == sorted(tensors[1]) == states[0]["tensors"]
    assert {name.split(".")[0] for name in tensors[0]} >= {"model", "optimizer", "random"}
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@EACH
def test_a_stopped_and_resumed_run_equals_a_straight_one(
    folder: Path, make: MakeConfig, train: Any
) -> None:
    straight = train(make(folder, "straight"))
    assert (straight.step, straight.finished) == (8, True)
    first = train(make(folder, "stopped", stop_at_step=3))
    assert (first.step, first.finished) == (3, False)
    assert not (folder / "stopped" / "model").exists()
    train(make(folder, "stopped", resume=True))
    assert_same_run(folder / "straight", folder / "stopped")


def test_a_resume_on_another_day_has_the_data_that_the_run_began_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = copy.copy(make_tokenizer(chat_template=CHATML))
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + CHATML
    save_model(tiny_model("llama", vocab_size=320), tokenizer, folder / "dated")
    rows = [
        {
            "prompt": turn("user", f"The {word}"),
            "chosen": turn("assistant", "yes"),
            "rejected": turn("assistant", "no"),
        }
        for word in WORDS
    ]
    source = str(write_rows(folder / "chats.jsonl", rows))

    def config(**train: Any) -> Any:
        found = dpo_config(folder, "run", max_steps=4, **train)
        data = replace(found.data, train=source, eval=None)
        return replace(found, model=replace(found.model, path=str(folder / "dated")), data=data)

    class Clock(datetime):
        today = datetime(2026, 11, 29, 23, 59)

        @classmethod
        def now(cls, tz: Any = None) -> "datetime":
            return cls.today

    monkeypatch.setattr(run_folder, "datetime", Clock)
    train_dpo(config(stop_at_step=2))
    Clock.today = datetime(2026, 11, 30, 0, 1)
    capsys.readouterr()
    record = folder / "run/began.txt"
    began = record.read_text()
    record.write_text(f"{Clock.today.isoformat()}\n")
    with pytest.raises(ValueError, match="training data"):
        train_dpo(config(resume=True))
    record.write_text(began)
    assert train_dpo(config(resume=True)).step == 4
    out = capsys.readouterr().out
    assert "reference log-probs: 13 cached, 0 to compute" in out.rpartition("began")[2]


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def test_two_runs_of_one_seed_are_the_same_and_another_seed_is_not(folder: Path) -> None:
    for run in ("first", "second"):
        train_ppo(ppo_config(folder, run))
    assert_same_run(folder / "first", folder / "second")
    config = ppo_config(folder, "other")
    train_ppo(replace(config, run=replace(config.run, seed=1)))
    assert numbers(folder / "first")[0]["reward"] != numbers(folder / "other")[0]["reward"]


@EACH
def test_what_was_logged_after_the_checkpoint_is_logged_once(
    folder: Path, make: MakeConfig, train: Any
) -> None:
    train(make(folder, "straight"))
    train(make(folder, "killed", save_every=2, stop_at_step=5))
    # As if the process had died before it saved step 5.
    newest = list_checkpoints(folder / "killed" / "checkpoints")[0]
    assert newest.name == "step-000005"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    train(make(folder, "killed", save_every=2, resume=True))
    assert [row["step"] for row in read_metrics(folder / "killed")] == list(range(1, 9))
    assert_same_run(folder / "straight", folder / "killed")


def test_old_checkpoints_are_removed(folder: Path) -> None:
    train_sft(sft_config(folder, "run", save_every=1, keep_checkpoints=3))
    names = [path.name for path in list_checkpoints(folder / "run/checkpoints")]
    assert names == ["step-000008", "step-000007", "step-000006"]


def test_an_empty_folder_cannot_be_resumed(folder: Path) -> None:
    with pytest.raises(ValueError, match="holds no run to resume"):
        train_sft(sft_config(folder, "none", resume=True))


def test_metrics_that_were_lost_are_no_reason_to_lose_the_run(folder: Path) -> None:
    train_sft(sft_config(folder, "straight"))
    train_sft(sft_config(folder, "run", stop_at_step=3))
    metrics = folder / "run/metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(lines[0] + lines[1][:40])
    config = sft_config(folder, "run", resume=True)
    with pytest.raises(ValueError, match=r"--run\.start-afresh metrics goes on with what there is"):
        train_sft(config)
    train_sft(replace(config, run=replace(config.run, start_afresh=("metrics",))))
    assert [row["step"] for row in read_metrics(folder / "run")] == [1, *range(4, 9)]
    weights = [load_file(folder / run / "model/model.safetensors") for run in ("straight", "run")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
