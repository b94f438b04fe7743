"""The frontier experiment: every command is one that fastalign takes, and failures are told."""

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.config_parse import parse_config, parse_flags
from fastalign.cli.settings import EvalConfig
from fastalign.trainers import PPOConfig, SFTConfig

ROOT = Path(__file__).parents[2]
PARSERS: dict[str, Callable[[Sequence[str]], Any]] = {
    "sft": lambda words: parse_config(SFTConfig, words, "sft"),
    "dpo": ALGORITHMS["dpo"].parse,
    "kto": ALGORITHMS["kto"].parse,
    "reward": ALGORITHMS["reward"].parse,
    "online-dpo": ALGORITHMS["online-dpo"].parse,
    "ppo": lambda words: parse_config(PPOConfig, words, "ppo"),
    "grpo": ALGORITHMS["grpo"].parse,
    "eval": lambda words: parse_flags(EvalConfig, words, "eval"),
}


@pytest.fixture
def frontier(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")  # which the workers get too
    return importlib.import_module("frontier")


@pytest.fixture
def experiment(frontier: Any) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((frontier.RECIPES / "experiment.yaml").read_text())
    return found


def test_every_command_is_understood(
    frontier: Any, experiment: dict[str, Any], tmp_path: Path
) -> None:
    labelled = list(frontier.method_jobs(experiment, tmp_path, False))
    jobs = frontier.shared_jobs(tmp_path, False) + [each.job for each in labelled]
    seen = {}
    for job in jobs:
        for name, *words in job.commands:
            if name in PARSERS:
                seen[name] = PARSERS[name](words)
    assert seen.keys() == PARSERS.keys()
    assert seen["sft"].train.batch_size == 64
    points = [(label["method"], label.get("strength")) for j in labelled for label in j.labels]
    counted = {point: points.count(point) for point in points}
    assert set(counted.values()) == {3}, "three seeds of each"
    methods: dict[str, int] = {}
    for method, _ in counted:
        methods[method] = methods.get(method, 0) + 1
    assert methods.pop("sft") == 1
    assert len(methods) == 11
    assert set(methods.values()) == {4}, "four strengths of each"
    quick = list(frontier.method_jobs(experiment, tmp_path, True))
    assert len(quick) == 1 + 2 * len(experiment["methods"])


def test_a_strength_reaches_the_run(
    frontier: Any, experiment: dict[str, Any], tmp_path: Path
) -> None:
    for each in frontier.method_jobs(experiment, tmp_path, False):
        (label, *_), (name, *words) = each.labels, each.job.commands[0]
        if name in ("dpo", "kto"):
            assert PARSERS[name](words).loss.beta == label["strength"]
        if name in ("ppo", "grpo"):
            config = PARSERS[name](words)
            assert config.kl.coefficient == label["strength"]
            assert config.run.seed == label["seed"]


def test_preferred_answers_are_those_of_the_label(frontier: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "response_a": "x", "response_b": "y", "label": label}
        for label in ("a", "b", "tie")
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    frontier.write_preferred(pairs, tmp_path / "out" / "preferred.jsonl")
    lines = (tmp_path / "out" / "preferred.jsonl").read_text().splitlines()
    assert [json.loads(line)["completion"] for line in lines] == ["x", "y"]


def test_a_run_that_fails_is_named_and_a_finished_one_left_alone(
    frontier: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "done"
    done.mkdir()
    bad = frontier.Job(tmp_path / "bad", (("sft", "--no-such-flag"),), tmp_path / "bad" / "x")
    finished = frontier.Job(done, (("sft", "--no-such-flag"),), done)
    with pytest.raises(SystemExit, match=r"1 runs failed; see log.txt in .*bad$"):
        frontier.run_all([bad, finished], 1)
    out = capsys.readouterr().out
    assert "2 runs, 1 of them already finished" in out
    assert "no-such-flag" in out
    assert "$ fastalign sft --no-such-flag" in (tmp_path / "bad" / "log.txt").read_text()
