"""The recipes on SmolLM2: their data, the settings of their commands, the page of their results."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.config_parse import parse_flags
from fastalign.cli.settings import EvalConfig
from tests.small_runs import write_rows

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("smollm2")


@pytest.mark.parametrize("name", ["dialogue", "summaries"])
def test_no_prompt_or_meeting_is_on_both_sides(script: Any, name: str) -> None:
    rows = list(script.TASKS[name].rows(script.RECIPES / "data"))
    train, held_out = script.split(iter(rows), script.TASKS[name].whole)
    key_of = {json.dumps(row): key for key, row in rows}
    sides = [{key_of[json.dumps(row)] for row in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert len(held_out) >= 9
    assert len(train) >= 3 * len(held_out)
    assert (train, held_out) == script.split(iter(rows[::-1]), script.TASKS[name].whole)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ["dialogue", "summaries"])
def test_the_commands_have_settings_that_exist(
    script: Any, name: str, quick: bool, tmp_path: Path
) -> None:
    task = script.TASKS[name]
    steps = list(task.steps(tmp_path, tmp_path / "base", task.quick if quick else task.whole))
    commands = [step.arguments[0] for step in steps]
    assert (
        commands
        == {
            "dialogue": ["reward", "dpo", "ppo", *["eval"] * 3],
            "summaries": ["sft", "ppo", "online-dpo", *["eval"] * 4],
        }[name]
    )
    for step in steps:
        command, *arguments = step.arguments
        if command == "eval":
            parse_flags(EvalConfig, arguments, command)
            continue
        config = ALGORITHMS[command].parse(arguments)
        assert str(step.result) == f"{config.run.dir}/model"
        assert (config.train.max_steps == 2) == quick


def evaluated(folder: Path, name: str, rewards: list[list[float]]) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question {number}"}],
            "completion": "a b c d a b c d" if sample else f"answer of {name}",
            "reward": reward,
        }
        for number, values in enumerate(rewards)
        for sample, reward in enumerate(values)
    ]
    place = folder / "evaluated" / name
    place.mkdir(parents=True)
    write_rows(place / "samples.jsonl", rows)
    result = {"reward": 1.25, "reward_se": 0.5, "kl": 3.5, "kl_se": 0.25, "accuracy": 0.625}
    result |= {"completion_tokens": 20, "completion_tokens_se": 2, "share_unfinished": 0.1}
    (place / "eval.json").write_text(json.dumps({**result, "accuracy_se": 0.05}))


def test_the_page_compares_each_model_with_the_start(script: Any, tmp_path: Path) -> None:
    for name in ("train", "eval", "prompts_eval"):
        script.write(tmp_path / "data" / f"{name}.jsonl", [{"prompt": name}] * 2)
    evaluated(tmp_path, "start", [[1.0, 2.0], [3.0, 4.0]])
    evaluated(tmp_path, "dpo", [[2.0, 2.0], [4.0, 5.0]])
    task = script.TASKS["dialogue"]
    page = script.page(task, "smollm2 dialogue", tmp_path, ("start", "dpo"), task.whole)
    # wins of the prompts: (1 + 1/2) / 2 and 1; five runs of four words, one a repeat, in half of
    # the answers
    line = "| `dpo` | 1.250 ± 0.500 | 0.88 ± 0.12 | 3.50 ± 0.25 | 20.0 ± 2.0 | 0.10 | 0.100 ± 0.000"
    assert f"{line} | 0.62 ± 0.05 |\n" in page
    assert "| `start` | 1.250 ± 0.500 |  | 0 |" in page
    assert "**Question 0**\n\n- `start` (1.00): answer of start\n- `dpo` (2.00): answer" in page


def test_a_folder_of_other_data_is_not_continued(script: Any, tmp_path: Path) -> None:
    script.write(tmp_path / "train.jsonl", [{"prompt": 1}])
    script.write(tmp_path / "train.jsonl", [{"prompt": 1}])
    with pytest.raises(ValueError, match=r"train.jsonl is of other data or of --quick"):
        script.write(tmp_path / "train.jsonl", [{"prompt": 2}])
