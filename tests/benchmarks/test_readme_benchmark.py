"""The README's benchmark prints its table and writes its rows, on a small head."""

import json
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import compare, head_rows, heads, readme
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
    # As its peer is compiled, but without machine code, which would take most of the time.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    asked: list[str] = []
    monkeypatch.setattr(head_rows, "refuse_on_a_red_test", asked.append)
    compare.main()
    assert asked == ["cpu"]
    assert "products ms" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {"eager", "fastalign", "trl", "liger"} <= {row["implementation"] for row in rows}
    assert {row["pass"] for row in rows} == set(head_rows.PASSES)
    names = (
        "case implementation dtype pass milliseconds spread peak_bytes flops device torch allocator"
    )
    assert {*names.split(), "products_milliseconds", "fraction_of_products"} == rows[0].keys()


def test_the_readmes_tables_are_made_from_rows_of_both_allocators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(name: str, cases: list[str], pass_: str) -> None:
        found = [
            {
                "case": case,
                "implementation": implementation,
                "dtype": "float32",
                "pass": pass_,
                "milliseconds": 1500 * (1 + (allocator == "keep")),
                "peak_bytes": 3 * 2**30,
                "fraction_of_products": 0.5,
                "allocator": allocator,
            }
            for case in cases
            for implementation in ("trl", "fastalign")
            for allocator in ("default", "keep")
            if (case, implementation) != ("gae", "trl")
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(found))

    rows("head", ["smollm2-135m", "another"], "forward+backward")
    rows("dpo-step", ["long-prompts"], "optimiser step")
    rows("ppo-step", ["gae", "rloo"], "PPO iteration")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    lines = readme.with_tables(README).splitlines()
    before = README.split(readme.BEGIN)[0].splitlines()
    assert lines[: len(before)] == before
    assert "| smollm2-135m | float32 | MiB |" in lines
    assert "| fastalign | 50 % / 50 % | 3,072 |" in lines
    assert "| fastalign | 1.5 / 3.0 | 50 % / 50 % | 3,072 / 3,072 |" in lines
    # a case without a contestant has empty cells
    assert "| TRL |  |  |  | 1.5 / 3.0 | 50 % / 50 % | 3,072 / 3,072 |" in lines
    assert readme.with_tables("\n".join(lines)).splitlines() == lines
