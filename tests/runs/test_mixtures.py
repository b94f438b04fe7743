"""Runs on several sources with weights: what they draw, say and record; resumed, and on ranks."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.main import main
from fastalign.runs import loop
from fastalign.runs.config import DataConfig
from fastalign.trainers import train_kto, train_sft
from tests import rank_processes as ranks
from tests.ranks.test_ranks import DDP, TRAINERS
from tests.runs.test_resume import numbers
from tests.small_runs import read_metrics, sft_config, write_rows
from tests.trainers.kto.test_kto import kto_config


def split(config: Any, folder: Path, name: str = "first") -> Any:
    """The run's data as two sources: the first five rows, twice an epoch, and the others, half."""
    source = Path(config.data.train)
    lines = source.read_text().splitlines(keepends=True)
    first, second = folder / f"{name}.jsonl", folder / "second:rows.jsonl"
    first.write_text("".join(lines[:5]))
    second.write_text("".join(lines[5:]))
    train = (f"{first}:2", f"{second}:0.5")
    return replace(config, data=replace(config.data, train=train))


EVERY = {**TRAINERS, "kto": (kto_config, train_kto)}


@pytest.mark.parametrize("trainer", EVERY)
def test_every_trainer_draws_sources_by_their_weights_and_resumes_to_the_bit(
    folder: Path,
    trainer: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, train = EVERY[trainer]
    taken: list[int] = []
    real = loop.indices_of_step

    def record(*arguments: Any, **options: Any) -> list[int]:
        found = real(*arguments, **options)
        taken.extend(found)
        return found

    monkeypatch.setattr(loop, "indices_of_step", record)
    num_rows = len(Path(make(folder, "run").data.train).read_text().splitlines())
    drawn = round(0.5 * (num_rows - 5))
    size = 10 + drawn
    sizes = {"max_steps": None, "epochs": 2.0, "batch_size": size // 2}
    train(split(make(folder, "run", **sizes), folder))
    out = capsys.readouterr().out
    first, second = folder / "first.jsonl", folder / "second:rows.jsonl"
    assert (
        f"data.train: {first}: 5 examples, weight 2: 10 of the {size} of an epoch "
        f"({1000 / size:.1f} %)" in out
    )
    assert f"{second}: {num_rows - 5} examples, weight 0.5: {drawn} of the {size}" in out
    for epoch in (taken[:size], taken[size : 2 * size]):
        counts = Counter(epoch)
        assert [counts[i] for i in range(5)] == [2] * 5
        assert sum(counts[i] for i in range(5, num_rows)) == drawn
    rows = read_metrics(folder / "run")
    assert [row["epoch"] for row in rows][-1] == pytest.approx(len(taken) / size)
    recorded = json.loads((folder / "run/sources.json").read_text())
    parts = [
        (part["source"], part["weight"], part["num_rows"], part["num_examples"], part["num_drawn"])
        for part in recorded["train"]
    ]
    assert parts == [
        (str(first), 2.0, 5, 5, 10),
        (str(second), 0.5, num_rows - 5, num_rows - 5, drawn),
    ]
    assert recorded["train"][0]["share"] == 10 / size
    assert [{*part} for part in recorded["eval"]] == [
        {"source", "num_rows", "num_examples", "fingerprint"}
    ] * (trainer != "online-dpo")
    card = (folder / "run/model/README.md").read_text()
    assert "| training, weight 2 |" in card
    assert recorded["train"][1]["fingerprint"] in card
    assert str(folder) not in card

    train(split(make(folder, "stopped", **sizes, stop_at_step=2), folder))
    train(split(make(folder, "stopped", **sizes, resume=True), folder))
    assert numbers(folder / "stopped") == numbers(folder / "run")
    weights = [load_file(folder / r / "model/model.safetensors") for r in ("run", "stopped")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert json.loads((folder / "stopped/sources.json").read_text()) == recorded


def test_ranks_draw_the_same(folder: Path) -> None:
    settings = {"max_steps": 5, "tokens_per_batch": 40}
    config = split(sft_config(folder, "alone", **settings), folder)
    _, train = TRAINERS["sft"]
    train(config)
    shared = replace(config, run=replace(config.run, dir=str(folder / "two")), parallel=DDP)
    ranks.run(2, folder / "logs", train, shared)
    alone, two = (read_metrics(folder / name) for name in ("alone", "two"))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in alone], rel=1e-5)
    assert [row["num_tokens"] for row in two] == [row["num_tokens"] for row in alone]


def test_a_source_that_changed_and_another_weight_are_named_on_a_resume(folder: Path) -> None:
    _, train = TRAINERS["sft"]
    train(split(sft_config(folder, "run", stop_at_step=2), folder))
    config = split(sft_config(folder, "run", resume=True), folder)
    other = (config.data.train[0], config.data.train[1].replace(":0.5", ":1"))
    with pytest.raises(ValueError, match=r"settings differ from the run's: data\.train \("):
        train(replace(config, data=replace(config.data, train=other)))
    second = folder / "second:rows.jsonl"
    write_rows(second, [{"text": "The menu"}])
    with pytest.raises(ValueError, match=r"training data \(.*second:rows\.jsonl\) is not what"):
        train(config)


def test_one_source_with_a_weight_and_none(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, train = TRAINERS["sft"]
    config = sft_config(folder, "run", max_steps=None, batch_size=6)
    train(config)
    assert "data.train:" not in capsys.readouterr().out
    assert len(json.loads((folder / "run/sources.json").read_text())["train"]) == 1
    twice = replace(config.data, train=f"{config.data.train}:2")
    config = sft_config(folder, "twice", max_steps=None, batch_size=6)
    assert train(replace(config, data=twice)).step == 4
    assert "12 examples, weight 2: 24 of the 24" in capsys.readouterr().out


def test_python_names_several_as_a_list(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = sft_config(folder, "run", max_steps=1)
    sources = [f"{config.data.train}:2", folder / "more.jsonl"]
    write_rows(folder / "more.jsonl", [{"text": "The menu"}])
    train_sft(replace(config, data=DataConfig()), train_data=sources)
    assert "more.jsonl: 1 examples, weight 1: 1 of the 25" in capsys.readouterr().out
    train_sft(
        replace(config, data=DataConfig(), run=replace(config.run, dir=str(folder / "rows"))),
        train_data=[{"text": "The menu"}],
    )
    recorded = json.loads((folder / "rows/sources.json").read_text())
    assert [part["source"] for part in recorded["train"]] == ["train_data (in memory)"]
    with pytest.raises(ValueError, match="eval_data: expected one file, folder or hub name, got 2"):
        train_sft(replace(config, data=DataConfig()), train_data=sources, eval_data=("a", "b"))


def test_a_run_does_not_write_among_its_data_whatever_their_weight(folder: Path) -> None:
    (folder / "sets").mkdir()
    write_rows(folder / "sets/a.jsonl", [{"text": "The menu"}])
    config = sft_config(folder, "sets/run")
    for train in (f"{folder}/sets:2", (f"{folder}/texts.jsonl", f"{folder}/sets:2")):
        data = replace(config.data, train=train)
        with pytest.raises(ValueError, match="a folder whose files are all read as data"):
            TRAINERS["sft"][1](replace(config, data=data))


@pytest.mark.parametrize(
    "text",
    [
        "[{first}:2, '{second}:0.5']",
        "{{{first}: 2, '{second}': 0.5}}",
        "\n    - {first}: 2\n    - '{second}': 0.5",
    ],
)
def test_a_yaml_file_names_them_as_a_list_or_a_mapping(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    names = {"first": "first.jsonl", "second": "second:rows.jsonl"}
    file.write_text(f"data:\n  train: {text.format(**names)}\n")
    flags = ["--config", str(file), "--model.path", "m", "--run.dir", "r"]
    found = ALGORITHMS["sft"].parse(flags).data.train
    assert found == ("first.jsonl:2", "second:rows.jsonl:0.5")


def test_the_command_line_and_a_yaml_file_name_several(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = split(sft_config(folder, "run"), folder)
    few = ["--train.max-steps", "1", "--train.device", "cpu", "--train.batch-size", "4"]
    flags = ["--model.path", str(folder / "llama"), "--run.dir", str(folder / "flags"), *few]
    assert main(["sft", "--data.train", *config.data.train, *flags]) == 0
    out = capsys.readouterr().out
    assert f"  data.train: {' '.join(config.data.train)}\n" in out
    assert "(71.4 %)" in out
    flags[3] = str(folder / "file")
    assert main(["sft", "--config", str(folder / "flags/config.yaml"), *flags]) == 0
    assert "(71.4 %)" in capsys.readouterr().out
    assert main(["sft", "--config", str(folder / "flags/config.yaml"), "--run.resume"]) == 0
    capsys.readouterr()
    flags[3] = str(folder / "twice")
    named = ["--data.train", "no.jsonl", "--data.train", config.data.train[0]]
    assert main(["sft", *named, *flags]) == 0
    assert "data.train is given more than once, and the last counts" in capsys.readouterr().out
    assert main(["sft", "--data.train", "a.jsonl:0", *flags]) == 2
    expected = "data.train: expected a weight above 0 and at most 10000 behind a.jsonl:, got 0"
    assert expected in capsys.readouterr().err
    assert main(["data", "check", *config.data.train]) == 0
    out = capsys.readouterr().out
    assert "first.jsonl: 5 of 5 rows can be used" in out
    assert "second:rows.jsonl: 7 of 7 rows can be used" in out
    assert main(["data", "check", str(folder / "llama/config.json"), config.data.train[0]]) == 2
