"""The README's benchmark prints its table and writes its rows, on a small head."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks import compare, head_rows, heads
from benchmarks.heads import HeadCase

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_benchmark_prints_a_table_and_writes_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(heads.CASES, "small", HeadCase("small", 16, 8, 50, 2))
    (line,) = re.findall(r"^python -m benchmarks\.compare (head .*)$", README, flags=re.MULTILINE)
    flags = ["--case=small", "--rounds=2", "--allocator=default"]
    monkeypatch.setattr(sys, "argv", ["compare", *shlex.split(line), *flags])
    monkeypatch.setitem(head_rows.TESTS, "cpu", ["tests/losses/test_segments_and_pairs.py"])
    compare.main()
    assert "products ms" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {"eager", "fastalign", "trl", "liger"} <= {row["implementation"] for row in rows}
    assert {row["pass"] for row in rows} == set(head_rows.PASSES)
    names = (
        "case implementation dtype pass milliseconds spread peak_bytes flops device torch allocator"
    )
    assert {*names.split(), "products_milliseconds", "fraction_of_products"} == rows[0].keys()
