"""The split of a file of comparisons: reproducible, whatever the order of rows and sides."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import write_rows

SCRIPTS = Path(__file__).parents[2] / "scripts"
Script = Callable[..., int]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """The script with some arguments; its exit code."""
    monkeypatch.syspath_prepend(SCRIPTS)
    split_pairs: Any = importlib.import_module("split_pairs")

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["split_pairs.py", *arguments])
        return int(split_pairs.main())

    return run


def split(
    script: Script, folder: Path, rows: list[dict[str, Any]], name: str, *options: str
) -> list[set[str]]:
    """The ids of the rows on each side."""
    source = write_rows(folder / f"{name}.jsonl", rows)
    sides = [folder / f"{name}_{side}.jsonl" for side in ("train", "held_out")]
    files = [str(source), "--train", str(sides[0]), "--held-out", str(sides[1])]
    assert script(*files, *options) == 0
    parts = [[json.loads(line) for line in side.read_text().splitlines()] for side in sides]
    by_id = {row["id"]: row for row in rows}
    assert all(row == by_id[row["id"]] for part in parts for row in part)
    return [{row["id"] for row in part} for part in parts]


def test_a_pair_is_where_it_was_whatever_stands_around_it(script: Script, tmp_path: Path) -> None:
    rows = [
        {"id": str(n), "prompt": "p", "response_a": f"a{n}", "response_b": "b", "votes": {"a": 1}}
        for n in range(200)
    ]
    train, held_out = split(script, tmp_path, rows, "one")
    assert len(train) + len(held_out) == 200
    assert 8 <= len(held_out) <= 35  # a tenth
    turned = [
        {**row, "response_a": row["response_b"], "response_b": row["response_a"]}
        for row in reversed(rows)
    ]
    assert split(script, tmp_path, turned, "two") == [train, held_out]
    assert split(script, tmp_path, rows, "more", "--share", "0.5")[1] > held_out


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ([{"prompt": "p", "response_a": "x"}], [], r"bad.jsonl:1: expected response_a and"),
        ([{"chosen": "a", "rejected": "b"}], ["--share", "1"], "--share: expected a number betw"),
        ([{"chosen": "a", "rejected": "b"}], ["--train", "bad.jsonl"], "bad.jsonl exists"),
    ],
)
def test_a_mistake_is_one_line(
    rows: list[dict[str, Any]],
    options: list[str],
    expected: str,
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_rows(tmp_path / "bad.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    assert script("bad.jsonl", "--train", "t.jsonl", "--held-out", "h.jsonl", *options) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
