"""The column `votes`: whose they are after the sides changed places, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fastalign.data.examples import Votes
from fastalign.data.load import load_examples
from tests.tokenizers import make_tokenizer

BASE = {"prompt": "a b", "response_a": " yes", "response_b": " no"}


def compared(label: str, votes: Any) -> dict[str, Any]:
    return {**BASE, "label": label, "votes": votes}


def load(path: Path, rows: list[dict[str, Any]], **options: Any) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(
        path, "preference", make_tokenizer(), max_length=64, ties="keep", **options
    )


def test_votes_follow_their_response(tmp_path: Path) -> None:
    rows = [
        compared("a", {"a": 3, "b": 1, "tie": 1}),
        compared("b", {"a": 1, "b": 3.5, "tie": 0}),
        compared("tie", {"a": 2, "b": 1}),
        compared("a", None),
        {**BASE, "label": "b"},
    ]
    data = load(tmp_path / "pairs.jsonl", rows)
    assert data.votes == [Votes(3, 1, 1), Votes(3.5, 1, 0), Votes(2, 1, 0), None, None]
    assert data.votes[0].shares() == pytest.approx((0.6, 0.2, 0.2))
    # The second row's sides changed places, and so did its votes.
    assert data.groups[1].response_ids == data.groups[0].response_ids[::-1]


def test_other_votes_are_other_data_and_no_duplicates(tmp_path: Path) -> None:
    one, other = compared("a", {"a": 3, "b": 2}), compared("a", {"a": 5, "b": 0})
    first = load(tmp_path / "one.jsonl", [one, one])
    second = load(tmp_path / "two.jsonl", [one, other])
    assert (first.report.num_duplicates, second.report.num_duplicates) == (1, 0)
    assert first.fingerprint != second.fingerprint


def test_of_chosen_and_rejected_votes_are_not_looked_at(tmp_path: Path) -> None:
    row = {"prompt": "a b", "chosen": " yes", "rejected": " no", "votes": {"a": 1, "b": 4}}
    assert load(tmp_path / "pairs.jsonl", [row]).votes == [None]


def test_votes_in_parquet_are_read(tmp_path: Path) -> None:
    table = pyarrow.table(
        {**{k: [v] for k, v in BASE.items()}, "label": ["b"], "votes": [{"a": 1, "b": 4, "tie": 0}]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    data = load_examples(tmp_path / "pairs.parquet", "preference", make_tokenizer(), max_length=64)
    assert data.votes == [Votes(4, 1, 0)]


BAD: dict[str, tuple[Any, str]] = {
    "list": ([3, 1, 1], r"expected an object of counts \{a, b, tie\}, got a list of 3 items"),
    "number": (5, "got the number 5"),
    "missing-side": ({"a": 3, "tie": 1}, "expected the keys a, b and tie, got 'a', 'tie'"),
    "null-side": ({"a": 3, "b": None}, "expected the keys a, b and tie"),
    "other-key": ({"a": 3, "b": 1, "none": 1}, "expected the keys a, b and tie"),
    "text-count": ({"a": "3", "b": 1}, "a: expected a count, got '3'"),
    "boolean-count": ({"a": 3, "b": True}, "b: expected a count, got the boolean true"),
    "negative-count": ({"a": 3, "b": 1, "tie": -1}, "tie: expected a finite count of at least 0"),
    "nan-count": ({"a": float("nan"), "b": 1}, "a: expected a finite count.*NaN"),
    "huge-count": ({"a": 10**400, "b": 1}, "a: expected a finite count"),
    "no-vote": ({"a": 0, "b": 0, "tie": 0}, "expected at least one vote, got none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_votes_are_named_by_file_line_and_column(name: str, tmp_path: Path) -> None:
    votes, expected = BAD[name]
    path = tmp_path / "pairs.jsonl"
    rows = [compared("a", {"a": 1, "b": 0}), compared("b", votes)]
    with pytest.raises(ValueError, match=rf"pairs\.jsonl:2: column 'votes': .*{expected}"):
        load(path, rows)
    kept = load(path, rows, on_bad_row="skip")
    assert (len(kept.groups), len(kept.report.faults)) == (1, 1)


def test_votes_in_csv_are_refused_unless_empty(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,response_a,response_b,label,votes\na b, yes, no,a,\n")
    assert load_examples(path, "preference", make_tokenizer(), max_length=64).votes == [None]
    path.write_text('prompt,response_a,response_b,label,votes\na b, yes, no,a,"{""a"": 3}"\n')
    with pytest.raises(ValueError, match=r"csv:2: column 'votes': .*CSV cannot hold objects"):
        load_examples(path, "preference", make_tokenizer(), max_length=64)
