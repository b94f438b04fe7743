"""Rows in memory are read as those of a file."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fastalign.data import token_cache
from fastalign.data.load import load_examples, load_prompts
from fastalign.in_memory import GivenRows, as_rows
from tests.tokenizers import make_tokenizer

ROWS = [
    {"prompt": f"Question {n}", "chosen": f" yes {n}", "rejected": f" no {n}", "margin": n / 4}
    for n in range(30)
]


def loaded(source: Any, **options: Any) -> Any:
    return load_examples(source, "preference", make_tokenizer(), max_length=64, **options)


def file_of(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("make", [list, tuple, iter, Dataset.from_list], ids=lambda m: m.__name__)
def test_they_have_the_tokens_of_the_file(make: Any, tmp_path: Path) -> None:
    expected, source = loaded(file_of(tmp_path)), as_rows("train_data", make(ROWS))
    for _ in range(2):  # what comes once is kept
        found = loaded(source)
        assert found.fingerprint == expected.fingerprint
        assert found.sources[7] == "train_data[7]"
        assert found.report.lines()[1:] == expected.report.lines()[1:]


def test_a_bad_row_is_skipped_and_counted_as_one_of_a_file(tmp_path: Path) -> None:
    rows = [*ROWS[:3], {"prompt": "Question", "chosen": " yes"}, *ROWS[3:6]]
    found = loaded(GivenRows("eval_data", rows), on_bad_row="skip")
    assert found.fingerprint == loaded(file_of(tmp_path, rows), on_bad_row="skip").fingerprint
    assert [fault.where for fault in found.report.faults] == ["eval_data[3]"]
    assert found.report.losses_line() == "eval_data (in memory): 6 of 7 rows used (1 bad)"
    found = loaded(GivenRows("train_data", [*rows[:2], {3: "no name"}]), on_bad_row="skip")
    assert "train_data[2]: expected text as the names" in str(found.report.faults[0])


def test_prompts_have_their_columns() -> None:
    from fastalign.data.columns import RowColumns

    rows = [{"prompt": f"Question {n}", "answer": n, "other": None} for n in range(4)]
    columns = RowColumns(required=("answer",), takers={"answer": "f"})
    found = load_prompts(
        GivenRows("train_data", rows), make_tokenizer(), max_length=20, columns=columns
    )
    assert found.columns_at([2, 0], 2) == {"answer": [2, 2, 0, 0]}


def test_a_large_dataset_is_tokenised_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "LARGE_ROWS", 20)
    expected = loaded(file_of(tmp_path)).fingerprint
    table = Dataset.from_list(ROWS)
    for source, kept in ((table, False), (table, True), (ROWS, False), (ROWS, False)):
        assert loaded(GivenRows("train_data", source)).fingerprint == expected
        printed = capsys.readouterr().out
        assert ("tokens of 30 rows are those of an earlier start" in printed) is kept
    other = table.map(lambda row: {"chosen": row["chosen"] + "!"})
    assert loaded(GivenRows("train_data", other)).fingerprint != expected
