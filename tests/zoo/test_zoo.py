"""The table of docs/models.md is what a few types give now, and has all types."""

from pathlib import Path

import pytest

from tests.zoo.__main__ import DOCS, cells_of, rows_of
from tests.zoo.zoo import TYPES, YES, run_row

TABLE = rows_of(DOCS.read_text(encoding="utf-8"))


# One of each path: sinks, narrow values, a dropped plan, a recurrent state, no left padding.
@pytest.mark.parametrize(
    "model_type", ["gpt_oss", "deepseek_v3", "stablelm", "qwen3_next", "recurrent_gemma"]
)
def test_a_row_is_what_its_type_gives(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = cells_of(run_row(model_type, tmp_path / model_type).line)
    expected = cells_of(TABLE[model_type])
    assert (found[:2], found[4:8]) == (expected[:2], expected[4:8])


def test_the_table_has_every_type_and_no_error() -> None:
    assert set(TABLE) >= set(TYPES)
    assert not [line for line in TABLE.values() if "ERROR" in line or "differ by" in line]
    rows = [cells_of(line) for line in TABLE.values()]
    assert sum(row[1] == "packed" for row in rows) >= 45
    assert sum(row[4] == YES for row in rows) >= 55
    assert sum(row[6] == YES for row in rows) >= 40
