"""A run says what it measured while it trains and at its end, and what to type next."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.config_parse import parse_flags
from fastalign.cli.main import MODULES, find, main
from fastalign.report.end_of_run import (
    EndOfRun,
    end_of_run,
    held_out_line,
    next_commands,
    numbers_of_run,
)
from fastalign.runs.config import LoraConfig
from fastalign.trainers import train_dpo, train_ppo, train_reward, train_sft
from tests.small_runs import (
    MakeConfig,
    dpo_config,
    ppo_config,
    read_metrics,
    reward_config,
    sft_config,
)


def test_first_and_last_numbers_are_said_with_their_steps() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": 0.69314, "step_seconds": 70.0, "num_tokens": 600},
        {"step": 2, "loss": "nan", "step_seconds": 40.0, "num_tokens": 1200, "eval_loss": 0.655},
        {"step": 3, "loss": 0.41, "step_seconds": 40.0, "num_tokens": 1800, "eval_loss": 0.52001},
    ]
    rows[2]["eval_rewards/accuracies"] = 0.75
    assert numbers_of_run(rows) == [
        "3 steps in 2 min, 1,800 tokens",
        "  held-out loss              0.655 (step 2) -> 0.52 (step 3)",
        "  held-out accuracy          0.75 (step 3)",
        "  loss                       0.6931 (step 1) -> 0.41 (step 3)",
    ]
    assert held_out_line(rows[2]) == "step 3, held-out: loss 0.52, accuracy 0.75"
    assert held_out_line(rows[0]) == ""
    assert numbers_of_run([]) == []


def test_numbers_that_cannot_be_read_end_no_run(tmp_path: Path) -> None:
    facts = EndOfRun("sft", tmp_path, "model", True, "base", "base", "texts.jsonl", None)
    path = tmp_path / "metrics.jsonl"
    path.write_text("[\n")
    assert end_of_run(facts, path)[0] == f"{path} could not be read"


FACTS = EndOfRun("sft", Path("my runs/one"), "model", True, "base", "ref", "train.jsonl", None)
COMMANDS = [
    replace(FACTS, command=name, held_out=held_out, finished=finished, samples=algorithm.samples)
    for name, algorithm in ALGORITHMS.items()
    for held_out in (None, "held out.jsonl")
    for finished in (True, False)
]


@pytest.mark.parametrize(
    "facts", COMMANDS, ids=lambda f: f"{f.command}, {f.held_out is not None}, {f.finished}"
)
def test_the_next_commands_are_understood(
    facts: EndOfRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my runs/one").mkdir(parents=True)
    config = Path("my runs/one/config.yaml")
    config.write_text("model: {path: base}\ndata: {train: train.jsonl}\nrun: {dir: my runs/one}\n")
    if ALGORITHMS[facts.command].samples:
        config.write_text(config.read_text() + "reward: {sources: [r.json]}\n")
    commands = next_commands(facts)
    assert len(commands) == (2 if facts.finished else 1)
    for command in commands:
        program, name, *arguments = shlex.split(command)
        assert program == "fastalign"
        if name in ALGORITHMS:
            parsed = ALGORITHMS[name].parse(arguments)
            assert parsed.run.resume != facts.finished
        else:
            parse_flags(find(MODULES[name].settings), arguments, f"fastalign {name}")
    if facts.finished:
        assert any("my runs/one/model" in command for command in commands)


TRAIN: dict[str, tuple[MakeConfig, Callable[[Any], Any]]] = {
    "sft": (sft_config, train_sft),
    "dpo": (dpo_config, train_dpo),
    "reward": (reward_config, train_reward),
    "ppo": (ppo_config, train_ppo),
}


@pytest.mark.parametrize("command", TRAIN)
def test_a_run_prints_its_evaluations_and_ends_with_its_numbers(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, train = TRAIN[command]
    train(make(folder, "run", max_steps=4, eval_every=2))
    lines = capsys.readouterr().out.splitlines()
    rows = read_metrics(folder / "run")
    name = "reward" if command == "ppo" else "loss"
    evaluated = [
        (row["step"], f"{row[f'eval_{name}']:.4g}") for row in rows if f"eval_{name}" in row
    ]
    assert [step for step, _ in evaluated] == [2, 4]
    for step, value in evaluated:
        (said,) = [line for line in lines if line.startswith(f"step {step}, held-out: ")]
        assert f"{name} {value}" in said
    values = " -> ".join(f"{value} (step {step})" for step, value in evaluated)
    assert f"  held-out {name:<17} {values}" in lines
    first, last = rows[0]["loss"], rows[-1]["loss"]
    assert f"  {'loss':<26} {first:.4g} (step 1) -> {last:.4g} (step 4)" in lines
    at = lines.index("next:")
    assert len(lines) == at + 3
    typed = [shlex.split(line)[1:] for line in lines[at + 1 :]]
    assert main(typed[0]) == 0
    assert (folder / "run/report.html").is_file()
    if command in ("dpo", "ppo"):  # with the files that the run knows
        assert main(typed[1]) == 0
    if command == "dpo":
        measured = json.loads((folder / "run/eval/eval.json").read_text())
        assert measured["accuracy"] == rows[-1]["eval_rewards/accuracies"]


def test_a_run_that_stops_says_how_to_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_sft(sft_config(folder, "run", max_steps=4, stop_at_step=2))
    lines = capsys.readouterr().out.splitlines()
    assert "stopped at step 2; saved; go on with --run.resume" in lines
    assert lines[-2] == "next:"
    words = shlex.split(lines[-1])[1:]
    assert words[0] == "sft"
    assert main(words) == 0
    assert [row["step"] for row in read_metrics(folder / "run")] == [1, 2, 3, 4]


def test_an_adapter_alone_is_the_model_to_go_on_with(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sft_config(folder, "run", max_steps=1)
    lora = LoraConfig(rank=2, save_merged=False)
    train_sft(replace(config, model=replace(config.model, lora=lora)))
    assert f"--model.path {folder}/run/adapter " in capsys.readouterr().out.splitlines()[-1]
