"""Malformed files: one clear line a fault, exit code 2, never a traceback.

With `--data.on-bad-row skip` the good rows are used and the bad counted.
"""

import bz2
import csv
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fastalign.cli.main import main
from tests.data.malformed_files import CHAT, GOOD, TEXT_CASES, row
from tests.tokenizers import make_tokenizer


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, list[str]]:
    code = main(["data", "check", *arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err.splitlines()


@pytest.mark.parametrize("name", TEXT_CASES)
def test_a_malformed_file_is_named_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file_name, content, expected = TEXT_CASES[name]
    path = tmp_path / file_name
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    )
    code, _, faults = check(capsys, str(path))
    assert code == 2
    assert re.search(expected, faults[0]), faults
    assert faults[0].startswith(str(path))
    assert len(faults) == 1 or name in ("raw-newline", "array-of-numbers")
    assert len(faults[0]) < 500


@pytest.mark.parametrize("name", [n for n, case in TEXT_CASES.items() if "2:" in case[2]])
def test_with_skip_the_good_rows_are_used_and_the_bad_counted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file_name, content, _ = TEXT_CASES[name]
    path = tmp_path / file_name
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    )
    code, out, faults = check(capsys, str(path), "--data.on-bad-row", "skip")
    assert code == 0
    assert "1 of " in out
    assert all(line.startswith("skipped: ") for line in faults)
    assert f"{len(faults)} bad rows" in out


def nowhere(path: Path) -> Path:
    return path / "none.jsonl"


def loop(path: Path) -> Path:
    link = path / "loop.jsonl"
    link.symlink_to(link)
    return link


def dangling(path: Path) -> Path:
    link = path / "link.jsonl"
    link.symlink_to(path / "gone.jsonl")
    return link


def empty_folder(path: Path) -> Path:
    return path


def two_splits(path: Path) -> Path:
    for name in ("train.jsonl", "test.jsonl"):
        (path / name).write_text(GOOD)
    return path


def saved_to_disk(path: Path) -> Path:
    (path / "dataset_info.json").write_text("{}")
    return path


def number_parquet(path: Path) -> Path:
    table = pyarrow.table({"prompt": ["a"], "chosen": [1], "rejected": [2]})
    pyarrow.parquet.write_table(table, path / "n.parquet")
    return path / "n.parquet"


def foreign_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), path / "n.parquet")
    return path / "n.parquet"


def huge_row(path: Path) -> Path:
    file = path / "huge.jsonl"
    file.write_text(GOOD + row(chosen="x" * 17 * 2**20))
    return file


def device(path: Path) -> Path:
    return Path("/dev/null")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (nowhere, "no such file"),
        (loop, "loop"),
        (dangling, "leads nowhere"),
        (empty_folder, "holds no"),
        (two_splits, "several splits"),
        (saved_to_disk, "save_to_disk"),
        (number_parquet, "column 'chosen'"),
        (foreign_parquet, "no column that is known"),
        (huge_row, "larger than 16 MiB"),
        (device, "pipe or a device"),
    ],
)
def test_a_malformed_path_is_named_in_one_line(
    make: Callable[[Path], Path],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, faults = check(capsys, str(make(tmp_path)))
    assert code == 2
    assert len(faults) == 1
    assert expected.lower() in faults[0].lower()


def zstd(content: bytes) -> bytes:
    found: bytes = pyarrow.compress(content, codec="zstd", asbytes=True)
    return found


GOOD_CASES: dict[str, tuple[str, str | bytes, int]] = {
    "byte-order-mark": ("ok.jsonl", b"\xef\xbb\xbf" + GOOD.encode(), 1),
    "carriage-returns": ("ok.jsonl", GOOD.replace("\n", "\r\n") * 2, 2),
    "old-mac": ("ok.jsonl", GOOD.replace("\n", "\r") * 2, 2),
    "no-last-newline": ("ok.jsonl", GOOD * 2 + GOOD.strip(), 3),
    "blank-lines-between": ("ok.jsonl", GOOD + "\n\n" + GOOD, 2),
    "line-separator": ("ok.jsonl", json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False), 1),
    "array": ("ok.json", f"[{GOOD.strip()},\n{GOOD.strip()}]", 2),
    "lines-in-json": ("ok.json", GOOD * 2, 2),
    "gzip": ("ok.jsonl.gz", gzip.compress(GOOD.encode() * 4), 4),
    "csv": ("ok.csv", "prompt,chosen,rejected\na b,c,d\n", 1),
    "csv-line-break-in-cell": ("ok.csv", 'text\n"a\nb"\nc\n', 2),
    "csv-gzip": ("ok.csv.gz", gzip.compress(b"text\na\n"), 1),
    "mixed-line-ends": ("ok.jsonl", GOOD + GOOD.strip() + "\r" + GOOD.strip() + "\r\n" + GOOD, 4),
    "csv-old-mac": ("ok.csv", "prompt,chosen,rejected\r" + "a b,c,d\r" * 5000, 5000),
    "csv-mixed-line-ends": ("ok.csv", 'text\r\n"a\r\nb"\rc\nd\r\n', 3),
    "array-old-mac": ("ok.json", f"[{GOOD.strip()},\r{GOOD.strip()}]\r", 2),
    "lines-in-json-old-mac": ("ok.json", "\r" + GOOD.replace("\n", "\r") * 3, 3),
    "tsv": ("ok.tsv", "prompt\tchosen\trejected\na, b\tc\td\n", 1),
    "ndjson": ("ok.ndjson", GOOD * 2, 2),
    "bzip2": ("ok.jsonl.bz2", bz2.compress(GOOD.encode()) * 2, 2),
    "zstandard": ("ok.csv.zst", zstd(b"text\na\n") + zstd(b"b\n"), 2),
    "implicit-prompt": ("ok.jsonl", '{"chosen": "a b c", "rejected": "a b d"}', 1),
    "null-margin": ("ok.jsonl", row(margin=None), 1),
    "extra-columns": ("ok.jsonl", row(id=7, meta={"x": [1]}), 1),
    "implicit-chat": (
        "ok.jsonl",
        json.dumps({"chosen": CHAT, "rejected": [CHAT[0], {**CHAT[1], "content": "bye"}]}),
        1,
    ),
}


@pytest.mark.parametrize("name", GOOD_CASES)
def test_an_unusual_but_good_file_is_read_whole(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file_name, content, count = GOOD_CASES[name]
    path = tmp_path / file_name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, faults = check(capsys, str(path))
    assert (code, faults) == (0, [])
    assert f"{count} of {count} rows can be used" in out


def test_parquet_with_messages_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pyarrow.table({"messages": [CHAT, CHAT]})
    pyarrow.parquet.write_table(table, tmp_path / "ok.parquet")
    code, out, _ = check(capsys, str(tmp_path / "ok.parquet"))
    assert code == 0
    assert "2 of 2" in out


def test_lengths_are_in_characters_or_with_a_tokenizer_in_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ok.jsonl"
    path.write_text(GOOD + row(prompt="abcde", chosen=" absolutely"))
    _, out, _ = check(capsys, str(path))
    assert "prompt characters: min 3, median 3, 95% 5, max 5, total 8" in out
    assert "response characters: min 3, median 4, 95% 11, max 11, total 21" in out
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    lengths = [len(tokenizer(text)["input_ids"]) for text in ("a b", "abcde")]
    longest = lengths[1] + len(tokenizer(" absolutely")["input_ids"])  # EOS for BOS
    arguments = [str(path), "--tokenizer", str(tmp_path / "tokenizer")]
    code, out, _ = check(capsys, *arguments, "--max-length", str(longest))
    assert code == 0
    assert f"prompt tokens: min {lengths[0]}, " in out
    assert f"max {lengths[1]}, total {sum(lengths)}" in out
    _, out, _ = check(capsys, *arguments, "--max-length", str(longest - 1))
    assert "1 of 2 rows can be used" in out
    assert "1 rows left out as too long" in out


def test_every_fault_is_shown_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(GOOD + row(chosen=None) + GOOD + "{\n" + row(margin=[1]))
    code, out, faults = check(capsys, str(path))
    assert code == 2
    assert [line.removeprefix(f"{path}:").split(":")[0] for line in faults] == ["2", "4", "5"]
    assert "2 of 5 rows can be used" in out
    assert "3 bad rows" in out


def test_a_quoted_csv_field_keeps_its_commas(tmp_path: Path) -> None:
    from fastalign.data.readers.rows import read_rows

    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], ['a, "b"\nc']])
    (only,) = read_rows(path, {"text"}, [])
    assert not isinstance(only, ValueError)
    assert dict(only.values) == {"text": 'a, "b"\nc'}
