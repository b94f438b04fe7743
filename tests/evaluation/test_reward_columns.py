"""Columns of a row go to the reward functions that take them, by name."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fastalign.cli.main import main
from fastalign.data.columns import RowColumns
from fastalign.data.load import load_prompts
from fastalign.data.read import require_columns
from fastalign.evaluation.rewards import apply_reward, columns_of
from tests.small_runs import write_rows
from tests.tokenizers import make_tokenizer

SEEN: dict[str, Any] = {}
ANSWERS = {"answer": ["1", "2"], "level": [3, None], "prompts": ["never", "never"]}


def as_ours(prompts: list[Any], completions: list[str], answer: list[str]) -> list[int]:
    SEEN.update(prompts=prompts, completions=completions, answer=answer)
    return [0, 0]


def as_trl(completions: list[str], answer: list[str], unit: Any = None, **rest: Any) -> list[int]:
    SEEN.update(completions=completions, answer=answer, unit=unit, **rest)
    return [0, 0]


def by_place(questions: list[Any], texts: list[str], /, *, level: Any = 7) -> list[int]:
    SEEN.update(prompts=questions, completions=texts, level=level)
    return [0, 0]


def other_names(p: list[Any], completions: list[str], **level: Any) -> list[int]:
    SEEN.update(prompts=p, completions=completions, **level)
    return [0, 0]


def swapped(completions: list[str], prompts: list[Any]) -> list[int]:
    SEEN.update(prompts=prompts, completions=completions)
    return [0, 0]


class Callable:
    def __call__(self, *both: Any, answer: Any) -> list[int]:
        SEEN.update(prompts=both[0], completions=both[1], answer=answer)
        return [0, 0]


BOTH = {"prompts": ["a", "b"], "completions": ["c", "d"]}
ANSWER, LEVEL = {"answer": ["1", "2"]}, {"level": [3, None]}


@pytest.mark.parametrize(
    ("function", "seen", "columns"),
    [
        (as_ours, BOTH | ANSWER, RowColumns(("answer",))),
        (as_trl, BOTH | ANSWER | LEVEL | {"unit": None}, RowColumns(("answer",), ("unit",), True)),
        (by_place, BOTH | LEVEL, RowColumns((), ("level",))),
        (other_names, BOTH | ANSWER | LEVEL, RowColumns(every=True)),
        (swapped, BOTH, RowColumns()),
        (Callable(), BOTH | ANSWER, RowColumns(("answer",))),
    ],
)
def test_a_function_is_given_what_its_signature_names(
    function: Any, seen: dict[str, Any], columns: RowColumns
) -> None:
    SEEN.clear()
    given = {name: values for name, values in ANSWERS.items() if name != "prompts"}
    assert apply_reward(function, ["a", "b"], ["c", "d"], columns=given) == [0, 0]
    assert seen == SEEN
    found = columns_of({"f": function})
    assert (found.required, found.optional, found.every) == (
        columns.required,
        columns.optional,
        columns.every,
    )


TAKES = columns_of({"my:own": as_ours, "my:other": by_place})
EVERY = columns_of({"my:own": as_trl})
ROWS: list[dict[str, Any]] = [
    {"prompt": "The menu", "answer": "4", "level": 2, "source": "x"},
    {"prompt": "The", "answer": ["\udc80", 1.5, None]},
]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return write_rows(folder / "rows.jsonl", rows)


def test_prompts_are_loaded_with_the_columns_that_are_taken(tmp_path: Path) -> None:
    tokenizer, file = make_tokenizer(), write(tmp_path, ROWS)
    plain = load_prompts(file, tokenizer, max_length=9)
    data = load_prompts(file, tokenizer, max_length=9, columns=TAKES)
    assert data.columns_at([1, 0], 2) == {
        "answer": [ROWS[1]["answer"]] * 2 + ["4"] * 2,
        "level": [None, None, 2, 2],
    }
    assert plain.columns_at([1, 0]) == {}
    assert list(data.prompt_ids) == list(plain.prompt_ids)
    assert plain.report.unused_columns == {"answer": 2, "level": 1, "source": 1}
    assert data.report.unused_columns == {"source": 1}
    everything = load_prompts(file, tokenizer, max_length=9, columns=EVERY)
    assert everything.columns_at([0]) == {"answer": ["4"], "level": [2], "source": ["x"]}
    assert "no row has columns that rewards use the defaults of: 'unit'" in "".join(
        everything.report.log_lines()
    )
    # A resumed run has to find the same answers.
    other = [ROWS[0] | {"answer": "5"}, ROWS[1]]
    prints = [plain.fingerprint, data.fingerprint, everything.fingerprint]
    prints += [
        load_prompts(write(tmp_path, other), tokenizer, max_length=9, columns=columns).fingerprint
        for columns in (TAKES, RowColumns())
    ]
    assert len(set(prints)) == 4
    assert prints[4] == plain.fingerprint


def test_tables_give_columns_too(tmp_path: Path) -> None:
    table = {
        "prompt": ["The", "The menu"],
        "answer": [[1, 2], None],
        "when": [date(2026, 1, 2)] * 2,
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("prompt,answer\nThe,4\n")
    options: dict[str, Any] = {"max_length": 9, "columns": EVERY}
    found = load_prompts(tmp_path / "rows.parquet", make_tokenizer(), **options)
    assert found.columns_at([0, 1]) == {"answer": [[1, 2], None], "when": ["2026-01-02"] * 2}
    found = load_prompts(tmp_path / "rows.csv", make_tokenizer(), **options)
    assert found.columns_at([0]) == {"answer": ["4"]}
    table["when"] = [b"\x00", b""]
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    with pytest.raises(
        ValueError, match=r"rows.parquet:1: column 'when': a value that JSON cannot hold"
    ):
        load_prompts(tmp_path / "rows.parquet", make_tokenizer(), **options)
    found = load_prompts(tmp_path / "rows.parquet", make_tokenizer(), max_length=9, columns=TAKES)
    assert found.columns_at([0]) == {"answer": [[1, 2]]}


def test_rows_without_a_required_column_are_named(tmp_path: Path) -> None:
    file = write(tmp_path, [*ROWS, {"prompt": "The"}])
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"rows.jsonl:3: column 'answer': missing; my:own takes"):
        load_prompts(file, tokenizer, max_length=9, columns=TAKES)
    skipped = load_prompts(file, tokenizer, max_length=9, columns=TAKES, on_bad_row="skip")
    assert (len(skipped), len(skipped.report.faults)) == (2, 1)
    require_columns(file, TAKES)
    said = (
        "rows.jsonl: column 'answer': no row has it, but my:own takes it; found 'prompt', 'level'"
    )
    with pytest.raises(ValueError, match=said):
        require_columns(write(tmp_path, [{"prompt": "The", "level": 1}]), TAKES)


def right(completions: list[str], answer: list[str]) -> list[float]:
    return [float(text == own) for text, own in zip(completions, answer, strict=True)]


RIGHT = "tests.evaluation.test_reward_columns:right"


def test_label_and_win_rate_give_a_sample_its_own_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [
        {"prompt": "1+1", "completion": "2", "answer": "2"},
        {"prompt": "1+2", "completion": "2", "answer": "3"},
        {"prompt": "1+1", "completion": "3", "answer": "2"},
        {"prompt": "1+2", "completion": "3", "answer": "3"},
    ]
    file, out = write(tmp_path, samples), tmp_path / "pairs.jsonl"
    command = ["label-by-reward", "--reward", RIGHT, "--data.samples", str(file), "--out", str(out)]
    assert main(command) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("2", "3"), ("3", "2")]
    paths = []
    for name, texts in (("ours", ["2", "2"]), ("theirs", ["3", "3"])):
        rows = [row | {"completion": text} for row, text in zip(samples[:2], texts, strict=True)]
        paths.append(str(write_rows(tmp_path / f"{name}.jsonl", rows)))
    sides = ["--model.samples", paths[0], "--baseline.samples", paths[1]]
    assert main(["win-rate", *sides, "--reward", RIGHT, "--out", str(tmp_path / "rate.json")]) == 0
    judged = (tmp_path / "rate.verdicts.jsonl").read_text().splitlines()
    assert [json.loads(line)["verdict"] for line in judged] == ["win", "loss"]
    del samples[2]["answer"]
    write(tmp_path, samples)
    capsys.readouterr()
    assert main([*command, "--overwrite"]) == 2
    said = f"rows.jsonl:3: column 'answer': missing; reward: {RIGHT} takes it"
    assert said in capsys.readouterr().err
