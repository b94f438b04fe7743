"""Runs whose reward needs the row's answer: trained, resumed, refused before a model is loaded."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from fastalign.cli.main import main
from fastalign.trainers import Grpo, train_ppo
from tests.small_runs import (
    WORDS,
    prompts_file,
    read_metrics,
    scored_by_answers,
    shared_letters,
)
from tests.trainers.ppo.ppo_cases import plain_config

HERE = "tests.trainers.sampling.test_reward_columns"
CALLS: list[tuple[Any, ...]] = []


def overlap(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    CALLS.append((prompts, completions, answer))
    return shared_letters(completions, answer)


def test_grpo_trains_on_the_answers_of_its_rows_and_resumes(folder: Path) -> None:
    config = scored_by_answers(
        plain_config(folder, ppo={"advantage": Grpo()}, train={"max_steps": 2, "eval_every": 2})
    )
    config = replace(config, reward=replace(config.reward, sources=(f"{HERE}:overlap",)))
    train_ppo(config)
    CALLS.clear()
    again = replace(config, run=replace(config.run, dir=str(folder / "again")))
    train_ppo(replace(again, train=replace(again.train, stop_at_step=1)))
    train_ppo(replace(again, run=replace(again.run, resume=True)))
    assert [len(prompts) for prompts, *_ in CALLS] == [8, 8, 13]
    for prompts, completions, answers in CALLS:
        assert answers == [f"{prompt.removeprefix('The ')}!" for prompt in prompts]
        assert len(completions) == len(answers)
    rows = read_metrics(folder / "run")
    assert [row["reward"] for row in rows] == [
        row["reward"] for row in read_metrics(folder / "again")
    ]
    assert rows[0]["reward_std"] > 0
    assert rows[0]["grad_norm"] > 0


@pytest.mark.parametrize("command", ["ppo", "online-dpo"])
def test_a_missing_column_is_said_before_a_model_is_loaded(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = prompts_file(folder)
    answered = scored_by_answers(plain_config(folder)).data.train
    reward = ["--reward.sources", f"{HERE}:overlap", "--run.dir", str(folder / "run")]
    data = ["--data.train", answered, "--data.eval", source]
    assert main([command, "--model.path", str(folder / "none"), *data, *reward]) == 2
    said = f"{source}: column 'answer': no row has it, but reward.sources: {HERE}:overlap takes it"
    assert said in capsys.readouterr().err


def test_generate_writes_the_columns_that_eval_gives_to_its_rewards(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = scored_by_answers(plain_config(folder)).data.train
    out = folder / "samples.jsonl"
    model = ["--model.path", str(folder / "llama"), "--data.prompts", source]
    sampling = ["--sampling.num-samples", "2", "--sampling.max-new-tokens", "3"]
    columns = ["--data.columns", "answer", "--out", str(out)]
    assert main(["generate", *model, *sampling, *columns]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["answer"] for row in rows] == [f"{word}!" for word in WORDS for _ in range(2)]
    assert main(["generate", *model, *columns, "--overwrite", "--data.columns", "sample"]) == 2
    assert "data.columns: expected columns besides prompt, comp" in capsys.readouterr().err
    CALLS.clear()
    evaluated = ["--reference.path", str(folder / "llama"), "--reward", f"{HERE}:overlap"]
    out = folder / "eval/eval.json"
    assert main(["eval", *model, *sampling, *evaluated, "--out", str(out)]) == 0
    ((_, completions, answers),) = CALLS
    assert answers == [row["answer"] for row in rows]
    expected = fmean(shared_letters(completions, answers))
    assert json.loads(out.read_text())["reward"] == pytest.approx(expected)
