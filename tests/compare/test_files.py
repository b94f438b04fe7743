"""Pairs from files and labels to files: nothing is lost or changed on the way."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastalign.cli.main import main
from fastalign.compare.pairs import read_pairs
from fastalign.compare.store import Store
from fastalign.data.examples import Votes
from fastalign.data.read import read_examples
from fastalign.data.report import DataReport
from tests.compare.site import new_store, vote_of
from tests.small_runs import write_rows


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names_and_verdicts(store: Store) -> dict[str, list[tuple[int, str]]]:
    found: dict[str, list[tuple[int, str]]] = {}
    names = {person.id: person.name for person in store.annotators()}
    for vote in store.votes():
        found.setdefault(names[vote.annotator], []).append((vote.pair, vote.verdict))
    return found


def test_samples_become_pairs_of_distinct_answers(tmp_path: Path) -> None:
    answers = {"One": ["a", "b", "a", ""], "Two": ["c", "d", "e", "f"], "Three": ["g", "g"]}
    rows = [{"prompt": p, "completion": c} for p, found in answers.items() for c in found]
    path = str(write_rows(tmp_path / "samples.jsonl", rows))
    pairs, lines = read_pairs(path, 6, 0)
    found = {(p.prompt, frozenset((p.response_a, p.response_b))) for p in pairs}
    assert len(pairs) == len(found) == 1 + 6
    assert ("One", frozenset("ab")) in found
    assert [line.removeprefix(f"{path}: ") for line in lines] == [
        "1 empty answers left out",
        "2 answers that a prompt has twice, once each",
        "1 prompts with fewer than two distinct answers left out",
    ]
    few, _ = read_pairs(path, 2, 0)
    assert len(few) == 1 + 2
    assert few == read_pairs(path, 2, 0)[0]
    assert few != read_pairs(path, 2, 1)[0]


def test_conversations_keep_their_turns(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    rows = [{"prompt": prompt, "completion": text} for text in ("Hello", "Go away")]
    pairs, _ = read_pairs(str(write_rows(tmp_path / "s.jsonl", rows)), 6, 0)
    assert pairs[0].prompt == prompt
    assert pairs[0].response_a in (
        [{"role": "assistant", "content": r["completion"]}] for r in rows
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "x"}, "expected samples (prompt, completion) or pairs of responses"),
        ({"prompt": "x", "completion": 3}, "column 'completion': expected text"),
        ({"prompt": "", "completion": "y"}, "column 'prompt': expected text, got an empty string"),
        ({"prompt": "x", "completion": "y"}, "expected two distinct answers of a prompt"),
    ],
)
def test_a_faulty_file_is_named(
    tmp_path: Path, row: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "s.jsonl", [row])
    arguments = ["compare", str(path), "--out", str(tmp_path / "c.db"), "--server.port", "0"]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert "s.jsonl" in err


def test_export_is_what_trainers_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = new_store(tmp_path, 6)
    for person, verdicts in {"anna": "abtxas", "ben": "attxb", "cleo": "ab"}.items():
        for pair, letter in enumerate(verdicts, 1):
            names = {"t": "tie", "x": "both_bad", "s": "skip"}
            vote_of(store, pair, person, names.get(letter, letter))  # type: ignore[arg-type]
    vote_of(store, 1, "anna", "b", left="b", chosen_by="repeat")
    out = tmp_path / "pairs.jsonl"
    arguments = ["compare", "export", str(store.path), "--out", str(out)]
    assert main(arguments) == 0
    assert f"5 pairs with 12 votes written to {out}" in capsys.readouterr().out
    rows = rows_of(out)
    assert [row["label"] for row in rows] == ["a", "b", "tie", "tie", "tie"]
    assert rows[1]["votes"] == {"a": 0, "b": 2, "tie": 1}
    assert rows[4]["votes"] == {"a": 1, "b": 1, "tie": 0}
    assert set(rows[0]) == {"prompt", "response_a", "response_b", "label", "votes"}
    report = DataReport("pairs")
    examples = list(read_examples(out, "preference", report, on_bad_row="error"))
    assert report.unused_columns == {}
    assert [(e.chosen, e.votes, e.tie) for e in examples[:3]] == [  # type: ignore[union-attr]
        ("first 0", Votes(3, 0, 0), False),
        ("the second one 1", Votes(2, 0, 1), False),
        ("first 2", Votes(0, 0, 2), True),
    ]
    assert main(arguments) == 2  # nothing is replaced
    assert main([*arguments, "--overwrite", "--both-bad", "drop"]) == 0
    assert len(rows_of(out)) == 4


def test_export_and_import_are_a_round_trip(tmp_path: Path) -> None:
    store = new_store(tmp_path, 4)
    for pair, verdict in enumerate(("a", "b", "tie", "both_bad"), 1):
        vote_of(store, pair, "anna", verdict)  # type: ignore[arg-type]
    vote_of(store, 1, "ben", "b")
    out, again = str(tmp_path / "all.jsonl"), str(tmp_path / "again.db")
    assert main(["compare", "export", str(store.path), "--out", out, "--details"]) == 0
    for _ in range(2):  # the second one adds nothing
        assert main(["compare", "import", out, "--out", again]) == 0
    other = Store(again)
    assert names_and_verdicts(other) == names_and_verdicts(store)
    found, expected = other.pairs(), store.pairs()
    assert [(p.prompt, p.response_a, p.response_b) for p in found] == [
        (p.prompt, p.response_a, p.response_b) for p in expected
    ]
    assert main(["compare", "import", out, "--out", str(store.path)]) == 0
    assert store.num_rows() == 5  # anna's and ben's votes are there


def test_votes_without_names_are_those_of_numbered_people(tmp_path: Path) -> None:
    row = {"prompt": "p", "response_a": "x", "response_b": "y", "label": "a"}
    rows = [
        {**row, "votes": {"a": 2, "b": 1, "tie": 0}},
        {**row, "response_a": "z", "label": "tie"},
    ]
    path, out = str(write_rows(tmp_path / "p.jsonl", rows)), str(tmp_path / "c.db")
    assert main(["compare", "import", path, "--out", out, "--annotator", "crowd"]) == 0
    assert names_and_verdicts(Store(out)) == {
        "crowd 1": [(1, "a"), (2, "tie")],
        "crowd 2": [(1, "a")],
        "crowd 3": [(1, "b")],
    }


def test_a_pair_in_the_other_order_is_the_same_pair(tmp_path: Path) -> None:
    store = new_store(tmp_path, 1)
    row = {"prompt": "Question 0?", "response_a": "the second one 0", "response_b": "first 0"}
    path = write_rows(tmp_path / "p.jsonl", [{**row, "label": "a"}])
    assert main(["compare", "import", str(path), "--out", str(store.path)]) == 0
    assert len(store.pairs()) == 1
    assert store.votes()[0].verdict == "b"


HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Go away",
}
ARGILLA = {
    "id": "1",
    "fields": {"prompt": "Hi", "response1": "Hello", "response2": "Go away"},
    "responses": {
        "preference": [
            {"value": "response1", "user_id": "u1", "status": "submitted"},
            {"value": "tie", "user_id": "u2", "status": "submitted"},
        ]
    },
    "metadata": {},
}
ARGILLA_FLAT = {
    "prompt": "Hi",
    "response1": "Hello",
    "response2": "Go away",
    "preference.responses": ["response2", "both"],
    "preference.responses.users": ["u1", "u2"],
}
ARGILLA_RANKING = {
    "fields": {"instruction": "Hi", "response-1": "Hello", "response-2": "Go away"},
    "responses": {
        "rank": [
            {"value": [{"value": "response-1", "rank": 2}, {"value": "response-2", "rank": 1}]}
        ]
    },
}
LABEL_STUDIO = {
    "id": 7,
    "data": {"prompt": "Hi", "answer1": "Hello", "answer2": "Go away"},
    "annotations": [
        {"completed_by": 3, "result": [{"type": "pairwise", "value": {"selected": "left"}}]},
        {
            "completed_by": {"id": 4, "email": "b@c.d"},
            "result": [{"type": "choices", "value": {"choices": ["tie"]}}],
        },
        {"completed_by": 5, "was_cancelled": True, "result": []},
    ],
}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (HH, {"imported 1": "a"}),
        (ARGILLA, {"u1": "a", "u2": "tie"}),
        (ARGILLA_FLAT, {"u1": "b", "u2": "tie"}),
        (ARGILLA_RANKING, {"argilla 1": "b"}),
        (LABEL_STUDIO, {"3": "a", "b@c.d": "tie"}),
    ],
    ids=["hh-rlhf", "argilla", "argilla-flat", "argilla-ranking", "label-studio"],
)
def test_exports_of_other_tools(
    tmp_path: Path, row: dict[str, Any], expected: dict[str, str]
) -> None:
    path, out = tmp_path / "export.json", str(tmp_path / "c.db")
    path.write_text(json.dumps([row]))
    assert main(["compare", "import", str(path), "--out", out]) == 0
    store = Store(out)
    (pair,) = store.pairs()
    assert str(pair.prompt).strip().removeprefix("Human: ").startswith("Hi")
    assert (pair.response_a.strip(), pair.response_b.strip()) == ("Hello", "Go away")
    assert names_and_verdicts(store) == {name: [(1, v)] for name, v in expected.items()}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"responses": {"q": [{"value": "perhaps"}]}}, "expected a verdict such as a, left"),
        ({"fields": {"prompt": "x", "text": "y"}}, "two answers (response_a and response_b"),
        ({"responses": {"q": [{"value": [{"value": "other", "rank": 1}]}]}}, "ranks of both"),
    ],
)
def test_what_is_not_understood_is_named(
    tmp_path: Path, change: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "e.jsonl", [ARGILLA, ARGILLA | change])
    assert main(["compare", "import", str(path), "--out", str(tmp_path / "c.db")]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert "e.jsonl:2" in err
    assert not (tmp_path / "c.db").exists()


def test_results_are_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = new_store(tmp_path, 4)
    for pair in (1, 2, 3, 4):
        vote_of(store, pair, "anna", "a", left="a" if pair < 4 else "b")
        vote_of(store, pair, "ben", "a" if pair < 4 else "b", left="b")
    out = tmp_path / "results.json"
    assert main(["compare", "results", str(store.path), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "Krippendorff's alpha" in text
    assert "anna" in text
    found = json.loads(out.read_text())
    assert (found["num_votes"], found["alpha_count"], found["left_count"]) == (8, 4, 8)
    assert found["left"] == 4 / 8
