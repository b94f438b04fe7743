"""Several sources of training data with weights: their names, their rows, their faults."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastalign.data.load import (
    load_examples,
    load_prompts,
    load_sources_of_data,
    print_sources,
)
from fastalign.data_sources import (
    WeightedSource,
    checked_sources,
    weighted_source,
    weighted_sources,
)
from fastalign.runs.config import DataConfig
from fastalign.trainers import PromptDataConfig
from tests.tokenizers import make_tokenizer


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.jsonl", "a.jsonl", 1.0),
        ("a.jsonl:2", "a.jsonl", 2.0),
        ("a.jsonl:0.25", "a.jsonl", 0.25),
        ("a.jsonl:.5", "a.jsonl", 0.5),
        ("a.jsonl:1e-2", "a.jsonl", 0.01),
        ("owner/name", "owner/name", 1.0),
        ("owner/name:test", "owner/name:test", 1.0),
        ("owner/name:test:2", "owner/name:test", 2.0),
        ("owner/name:config:test[:5%]", "owner/name:config:test[:5%]", 1.0),
        (r"C:\data\a.jsonl", r"C:\data\a.jsonl", 1.0),
        (r"C:\data\a.jsonl:2", r"C:\data\a.jsonl", 2.0),
        ("C:/data/a.jsonl", "C:/data/a.jsonl", 1.0),
        ("s3://bucket/a.jsonl", "s3://bucket/a.jsonl", 1.0),
        ("s3://bucket/a.jsonl:2", "s3://bucket/a.jsonl", 2.0),
        ("http://host:8000", "http://host:8000", 1.0),
        ("http://host:8000/a.jsonl:3", "http://host:8000/a.jsonl", 3.0),
        ("a.jsonl:two", "a.jsonl:two", 1.0),
        (":2", ":2", 1.0),
    ],
)
def test_a_number_behind_the_last_colon_is_the_weight(text: str, path: str, weight: float) -> None:
    assert weighted_source(text) == WeightedSource(path, weight)


def test_a_file_that_exists_has_its_whole_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:2").touch()
    assert weighted_source("a:2") == WeightedSource("a:2")
    assert weighted_source("a:2:3") == WeightedSource("a:2", 3.0)
    Path("a").touch()
    with pytest.raises(ValueError, match=r"there are a:2 and a; write a:2:1 .* and a:2\.0 for"):
        weighted_source("a:2")
    assert weighted_source("a:2:1") == WeightedSource("a:2", 1.0)
    assert weighted_source("a:2.0") == WeightedSource("a", 2.0)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("a.jsonl:0", "expected a weight above 0 and at most 10000 behind a.jsonl:, got 0"),
        ("a.jsonl:-1", "expected a weight above 0 and at most 10000 behind a.jsonl:, got -1"),
        ("a.jsonl:1e9", "at most 10000 behind a.jsonl:, got 1e9"),
        ("a.jsonl:2x", "expected a number above 0 as the weight of a.jsonl, .* got '2x'"),
        ("a.jsonl:50%", "such as a.jsonl:2 or a.jsonl:0.5, got '50%'"),
        ("a.jsonl:", "as the weight of a.jsonl, .* got ''"),
        ("", "expected a file, folder or hub name, or several, got ''"),
        ((), r"expected a file, folder or hub name, or several, got \(\)"),
        (("a.jsonl", ""), "expected a file, folder or hub name, or several"),
        (("a.jsonl", "./a.jsonl:2"), "./a.jsonl is named twice; a weight says how often"),
        (("x/y:train", "x/y:train:2"), "x/y:train is named twice"),
        ("a.jsonl:2,b.jsonl", "no such file: .* commas or quotes: a.jsonl:2 b.jsonl$"),
        ("a.jsonl b.jsonl:3", "no such file: .* commas or quotes: a.jsonl b.jsonl:3$"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused_with_the_settings(
    train: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()
    for make in (DataConfig, PromptDataConfig):
        with pytest.raises(ValueError, match=f"^data.train: .*{message}"):
            make(train=train)


def test_settings_hold_one_source_as_text_and_several_as_a_tuple() -> None:
    assert DataConfig(train="a.jsonl").train == "a.jsonl"
    assert DataConfig(train=("a.jsonl",)).train == "a.jsonl"
    listed: Any = ["a.jsonl:2", "b.jsonl"]
    assert DataConfig(train=listed).train == ("a.jsonl:2", "b.jsonl")
    assert checked_sources("a,b.jsonl") == "a,b.jsonl"  # a name with a comma, of no file here


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text_rows(*texts: str) -> list[dict[str, Any]]:
    return [{"text": text} for text in texts]


def load(*sources: str, **options: Any) -> Any:
    return load_sources_of_data(
        weighted_sources(sources),
        lambda path: load_examples(path, "sft", make_tokenizer(), max_length=50, **options),
    )


def test_sources_lie_one_behind_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a.jsonl", text_rows("The phone", "a menu", "slow"))
    b = write(tmp_path / "b.jsonl", text_rows("good button", "dim"))
    data = load(f"{a}:2", f"{b}:0.5")
    alone = [load(a), load(b)]
    assert list(data.groups) == [group for each in alone for group in each.groups]
    assert data.groups.lengths(share_prompts=True) == alone[0].groups.lengths(
        share_prompts=True
    ) + alone[1].groups.lengths(share_prompts=True)
    assert list(data.sources) == [f"{a}:1", f"{a}:2", f"{a}:3", f"{b}:1", f"{b}:2"]
    assert data.sources[-1] == f"{b}:2"
    assert (len(data), len(data.ties), len(data.margins), len(data.votes)) == (5, 5, 5, 5)
    assert (data.mixture.sizes, data.mixture.drawn) == ((3, 2), (6, 1))
    assert [part.fingerprint for part in data.parts] == [each.fingerprint for each in alone]
    assert data.fingerprint not in {each.fingerprint for each in alone}
    assert data.fingerprint == load(a, f"{b}:9").fingerprint != load(b, a).fingerprint
    assert (data.report.num_rows, data.report.num_used) == (5, 5)
    assert len(data.report.response_lengths) == 5
    print_sources(data.parts)
    assert capsys.readouterr().out.splitlines() == [
        f"data.train: {a}: 3 examples, weight 2: 6 of the 7 of an epoch (85.7 %)",
        f"data.train: {b}: 2 examples, weight 0.5: 1 of the 7 of an epoch (14.3 %)",
    ]
    print_sources(alone[0].parts)
    assert capsys.readouterr().out == ""


def test_a_bad_row_is_named_by_its_file_and_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a.jsonl", text_rows("The phone", "a menu"))
    b = write(tmp_path / "b.jsonl", [*text_rows("good"), {"text": None}, {"text": "x " * 60}])
    with pytest.raises(ValueError, match=rf"{b}:2: column 'text': expected text .*got null"):
        load(a, f"{b}:3")
    data = load(a, f"{b}:3", on_bad_row="skip", on_too_long="skip")
    assert (data.mixture.sizes, data.mixture.drawn) == ((2, 1), (2, 3))
    assert [part.num_rows for part in data.parts] == [2, 3]
    data.report.print_losses()
    out = capsys.readouterr().out
    assert f"{b}: 1 of 3 rows used (1 bad, 1 too long)" in out
    assert f"skipped: {b}:2: column 'text'" in out
    assert f"{a}:" not in out


def test_prompts_of_several_sources_have_their_own_columns(tmp_path: Path) -> None:
    from fastalign.data.columns import RowColumns

    a = write(tmp_path / "a.jsonl", [{"prompt": "The phone", "answer": "1"}])
    b = write(tmp_path / "b.jsonl", [{"prompt": "a menu"}, {"prompt": "slow", "answer": "3"}])
    columns = RowColumns(optional=("answer", "none"))
    data = load_sources_of_data(
        weighted_sources((a, f"{b}:2")),
        lambda path: load_prompts(path, make_tokenizer(), max_length=50, columns=columns),
    )
    assert list(data.prompts) == ["The phone", "a menu", "slow"]
    assert [len(ids) for ids in data.prompt_ids] == [
        len(make_tokenizer()(text)["input_ids"]) for text in data.prompts
    ]
    assert data.columns_at([2, 0, 1]) == {"answer": ["3", "1", None]}
    assert data.report.absent_columns == ["none"]
    assert data.mixture.drawn == (1, 4)
    first = data.first()
    assert (list(first.prompts), first.columns_at([0])) == (["The phone"], {"answer": ["1"]})
    assert (len(first), first.mixture.drawn) == (1, (1,))
