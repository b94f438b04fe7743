"""The growth of a step: exponents of known curves, and a table on tiny sizes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare, growth


def test_exponents_are_those_of_the_curve() -> None:
    assert growth.exponent((2, 3.0), (4, 12.0)) == pytest.approx(2)
    assert growth.exponent((1, 5.0), (4, 10.0)) == pytest.approx(0.5)


def test_a_table_of_one_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = torch.get_num_threads()
    file = tmp_path / "rows.json"
    monkeypatch.setattr(growth, "BASE", growth.Sizes(pairs=1, prompt=4, response=3, vocabulary=64))
    monkeypatch.setattr(growth, "FACTORS", (1, 4))
    line = "compare growth --model tiny --case response --rounds 1 --threads 1 --allocator default"
    monkeypatch.setattr(sys, "argv", [*line.split(), "--json", str(file)])
    compare.main()
    torch.set_num_threads(number)
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    assert [(row["implementation"], row["size"]) for row in rows] == [
        (name, size) for name in growth.CONTESTANTS for size in (3, 12)
    ]
    for first, second in zip(rows[0::2], rows[1::2], strict=True):
        assert first["exponent"] is None
        ratio = second["milliseconds"] / first["milliseconds"]
        assert 4 ** second["exponent"] == pytest.approx(ratio)
