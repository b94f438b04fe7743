"""Two reward models on the same pairs: the mean of the differences and its standard error."""

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
Compare = Callable[[Path, Path], tuple[int, str, str]]


def make_run(folder: Path, likelihoods: list[float], source: str = "held_out.jsonl") -> Path:
    (folder / "eval").mkdir(parents=True)
    rows = [
        {"source": f"{source}:{n}", "tie": n > 2, "log_likelihood": value}
        for n, value in enumerate(likelihoods, start=1)
    ]
    (folder / "eval/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Compare:
    """The script of two folders: its exit code, and what it prints."""
    monkeypatch.syspath_prepend(SCRIPTS)
    script: Any = importlib.import_module("compare_reward_runs")

    def run(first: Path, second: Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compare_reward_runs.py", str(first), str(second)])
        return (script.main(), *capsys.readouterr())

    return run


def test_the_difference_is_pair_by_pair(compare: Compare, tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", [-1.0, -5.0, -2.0])
    two = make_run(tmp_path / "two", [-2.0, -8.0, -4.0])
    code, out, _ = compare(one, two)
    assert code == 0
    # Differences 1, 3 and, of the tie, 2.
    lines = out.splitlines()
    assert lines[0] == f"all pairs: +2.0000 +- {1 / math.sqrt(3):.4f} of 3"
    assert lines[1] == "ties: +2.0000 +- nan of 1"
    assert lines[2] == "the others: +2.0000 +- 1.0000 of 2"


def test_other_pairs_or_none_are_refused_in_one_line(compare: Compare, tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", [-1.0, -5.0])
    other = make_run(tmp_path / "other", [-1.0, -5.0], source="other.jsonl")
    for second, expected in ((other, "judged on the same rows"), (tmp_path, "no eval/pairs.jsonl")):
        code, _, error = compare(one, second)
        assert code == 2
        assert expected in error
        assert error.count("\n") == 1
