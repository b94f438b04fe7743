"""Hub names, folders and tokenizers."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastalign.data import eos_token_ids, load_sft, load_tokenizer
from fastalign.data.readers.rows import is_hub_name
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
    data = load_sft(source, make_tokenizer(), max_length=9)
    assert calls == [expected]
    assert data.sources == [f"{source}:1", f"{source}:2"]


def test_what_is_a_hub_name() -> None:
    assert is_hub_name("imdb")
    assert not is_hub_name("a/b/c")
    assert not is_hub_name("a b")


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "notes.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    data = load_sft(tmp_path, make_tokenizer(), max_length=9)
    assert data.sources == [f"{tmp_path / name}:1" for name in ("a.jsonl", "b.jsonl")]


def test_stop_tokens_are_the_tokenizers_and_the_generation_configs(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert eos_token_ids(tokenizer, tmp_path) == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 2]}')
    assert eos_token_ids(tokenizer, tmp_path) == (2, 4)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"generation_config\.json: expected a JSON object"):
        eos_token_ids(tokenizer, tmp_path)


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
