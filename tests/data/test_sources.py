"""Hub names, folders and tokenizers."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fastalign.cli.main import main
from fastalign.data.load import load_examples
from fastalign.data.readers import files
from fastalign.data.readers.rows import is_hub_name, read_rows
from fastalign.data.tokenizer import eos_token_ids, load_tokenizer
from tests.tokenizers import make_tokenizer


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name:config:test[:5%]", ("owner/name", "config", "test[:5%]")),
    ],
)
def test_a_hub_name_is_read_through_datasets(
    source: str, expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    calls = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        calls.append((name, config, split))
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_examples(source, "sft", make_tokenizer(), max_length=9)
    assert set(calls) == {expected}
    assert list(data.sources) == [f"{source}:1", f"{source}:2"]


def test_what_is_a_hub_name() -> None:
    assert is_hub_name("imdb")
    assert not is_hub_name("a/b/c")
    assert not is_hub_name("a b")


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "notes.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    data = load_examples(tmp_path, "sft", make_tokenizer(), max_length=9)
    assert list(data.sources) == [f"{tmp_path / name}:1" for name in ("a.jsonl", "b.jsonl")]


def test_stop_tokens_are_the_tokenizers_and_the_generation_configs(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert eos_token_ids(tokenizer, tmp_path) == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 2]}')
    assert eos_token_ids(tokenizer, tmp_path) == (2, 4)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"generation_config\.json: expected a JSON object"):
        eos_token_ids(tokenizer, tmp_path)


def test_an_adapter_has_the_stop_tokens_of_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, base, adapter = make_tokenizer(), tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert eos_token_ids(tokenizer, adapter) == (2, 9)
    (adapter / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert eos_token_ids(tokenizer, adapter) == (2, 5)
    (adapter / "generation_config.json").unlink()
    cached = tmp_path / "cache/models--someone--base"  # a base of the hub, which is in the cache
    (cached / "snapshots/0f").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0f")
    (cached / "snapshots/0f/generation_config.json").write_text('{"eos_token_id": 7}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config.write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    assert eos_token_ids(tokenizer, adapter) == eos_token_ids(tokenizer, "someone/base") == (2, 7)
    assert eos_token_ids(tokenizer, "someone/other") == (2,)


def test_a_missing_pad_token_becomes_eos(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = tmp_path / name
        if path.exists():
            values = json.loads(path.read_text())
            values.pop("pad_token", None)
            path.write_text(json.dumps(values))
    assert load_tokenizer(tmp_path).pad_token_id == 2


def test_a_tokenizer_that_is_not_there_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="has no tokenizer's files"):
        load_tokenizer(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_what_a_folder_holds_beside_its_data_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    for name in ("a.parquet.gz", "b.jsonl.xz", "README.md", ".hidden.jsonl", "evil\x1b[2J.txt"):
        (folder / name).write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert main(["data", "check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 rows can be used" in out
    assert "not read: 6 others: " in out
    for name in ("a.parquet.gz", "b.jsonl.xz", "README.md", ".hidden.jsonl", "linked/ (a link"):
        assert f"'{name}" in out
    assert "\x1b" not in out
    lines = load_examples(folder, "sft", make_tokenizer(), max_length=9).report.log_lines()
    assert any("not read: 6 others" in line for line in lines)


def test_columns_that_nothing_uses_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a b", "answer": "c", "bad_answer": "d"}\n' * 8)
    assert main(["data", "check", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.count("columns that nothing uses: 'answer', 'bad_answer'") == 1
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "votes": {"a": 1, "b": 0}}\n')
    (line,) = load_examples(path, "preference", make_tokenizer(), max_length=9).report.log_lines()
    assert line == f"{path}: columns that nothing uses: 'votes'"
    path.write_text('{"prompt": "a", "completion": "b", "label": "good"}\n')
    lines = load_examples(path, "sft", make_tokenizer(), max_length=9).report.log_lines()
    assert lines == [
        f"{path}: columns that nothing uses: 'label'",
        f"{path}: a label beside a completion is used where it is true or false",
    ]


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * 2)
    rows = read_rows(path, {"text"}, [])
    next(rows)
    with path.open("a") as file:
        file.write('{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"it had 28 bytes, 42 were read: it changed"):
        list(rows)


def test_every_line_end_is_read_across_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    ends = ["\n", "\r\n", "\r"]
    generator = random.Random(0)
    for size in (1, 2, 3, 7):
        monkeypatch.setattr(files, "_BLOCK_BYTES", size)
        texts = [f'{{"text": "{"x" * generator.randrange(9)}"}}' for _ in range(40)]
        path.write_bytes("".join(text + generator.choice(ends) for text in texts).encode())
        found = [line.rstrip(b"\r\n").decode() for _, line in files.read_lines(path)]
        assert found == texts


def test_a_parquet_file_is_read_to_the_rows_of_its_footer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "id": [1, 2, 3]}), path)
    data = load_examples(path, "sft", make_tokenizer(), max_length=9)
    assert data.report.log_lines() == [f"{path}: columns that nothing uses: 'id'"]
    whole = pyarrow.parquet.ParquetFile.iter_batches

    def lossy(self: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
        return (batch[:2] for batch in whole(self, *arguments, **options))

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", lossy)
    with pytest.raises(ValueError, match="its footer lists 3 rows, it holds 2"):
        load_examples(path, "sft", make_tokenizer(), max_length=9)


def test_a_value_of_parquet_that_python_cannot_hold_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    dates = pyarrow.array([2**62], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "completion": dates}), path)
    with pytest.raises(ValueError, match=r"parquet:1: column 'completion': a value of type"):
        load_examples(path, "sft", make_tokenizer(), max_length=9)
