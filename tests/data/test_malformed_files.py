"""`fastalign data check` on files as real exports get them wrong: one clear line a fault, exit code
2, never a traceback; and with `--data.on-bad-row skip`, the good rows are used and the bad counted.
"""

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

GOOD = '{"prompt": "a b", "chosen": " yes", "rejected": " no"}\n'
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def row(**values: object) -> str:
    base: dict[str, object] = {"prompt": "a b", "chosen": " yes", "rejected": " no"}
    return json.dumps({**base, **values}) + "\n"


def without(name: str) -> str:
    values = json.loads(GOOD)
    del values[name]
    return json.dumps(values) + "\n"


def turns(*pairs: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in pairs]}) + "\n"


# name of the file, content, what the line must say; `bad.jsonl:2` is where the fault is
TEXT_CASES: dict[str, tuple[str, str | bytes, str]] = {
    "truncated-json": ("bad.jsonl", GOOD + '{"prompt": "a", "cho', "2:.*invalid JSON"),
    "cut-off-in-array": ("bad.json", '[{"prompt": "a", "chosen": "b"', "cut off"),
    "array-never-closed": (
        "bad.json",
        '[{"prompt": "a", "chosen": "b", "rejected": "c"}',
        "closed",
    ),
    "array-extra-comma": ("bad.json", f"[{GOOD.strip()},]", "invalid JSON"),
    "array-missing-comma": ("bad.json", f"[{GOOD.strip()} {GOOD.strip()}]", "','"),
    "after-the-array": ("bad.json", f"[{GOOD.strip()}] x", "after the array"),
    "array-of-numbers": ("bad.json", "[1, 2]", "expected a JSON object"),
    "top-level-object": ("bad.json", '{"data": [1]}', "JSON array"),
    "top-level-null": ("bad.json", "null", "JSON array"),
    "array-in-jsonl": ("bad.jsonl", f"[{GOOD.strip()}]\n", r"named \.json"),
    "pretty-printed": ("bad.jsonl", '{\n  "prompt": "a"\n}\n', "spread over lines"),
    "two-objects": ("bad.jsonl", GOOD + GOOD.strip() + GOOD, "2:.*two objects on one line"),
    "trailing-comma": ("bad.jsonl", GOOD + GOOD.strip() + ",\n", "2:.*comma after"),
    "python-dict": ("bad.jsonl", GOOD + "{'prompt': 'a'}\n", "2:.*double quotes"),
    "raw-tab": ("bad.jsonl", GOOD + '{"prompt": "a\tb"}\n', "2:.*raw line break"),
    "raw-newline": ("bad.jsonl", GOOD + '{"prompt": "a\nb"}\n', "2:.*invalid JSON"),
    "duplicated-key": ("bad.jsonl", '{"prompt": "a", "prompt": "b"}\n', "1:.*'prompt'.*twice"),
    "deep-nesting": ("bad.jsonl", "[" * 100_000 + "\n", "1:.*"),
    "number-row": ("bad.jsonl", GOOD + "3\n", "2:.*expected a JSON object"),
    "utf-16": ("bad.jsonl", GOOD.encode("utf-16"), "UTF-16"),
    "utf-16-no-mark": ("bad.jsonl", GOOD.encode("utf-16-le"), "UTF-16"),
    "utf-32": ("bad.jsonl", GOOD.encode("utf-32"), "UTF-32"),
    "latin-1": (
        "bad.jsonl",
        GOOD.encode() + row(chosen=1).replace("1", '"caf\xe9"').encode("latin-1"),
        "2:.*not UTF-8",
    ),
    "nul-bytes": ("bad.jsonl", GOOD + row(chosen="a\0b"), "2:.*NUL"),
    "lone-surrogate": ("bad.jsonl", GOOD + row(chosen="a\ud800"), "2:.*surrogate"),
    "gzip-without-suffix": ("bad.jsonl", gzip.compress(GOOD.encode()), "gzip"),
    "suffix-without-gzip": ("bad.jsonl.gz", GOOD, "not gzip"),
    "truncated-gzip": ("bad.jsonl.gz", gzip.compress(GOOD.encode() * 500)[:-20], "cut off"),
    "flipped-gzip": ("bad.jsonl.gz", gzip.compress(GOOD.encode() * 9)[:-8] + b"\0" * 8, "gzip"),
    "zip": ("bad.jsonl", b"PK\x03\x04" + b"x" * 40, "zip archive"),
    "parquet-as-jsonl": ("bad.jsonl", b"PAR1" + b"x" * 40, "parquet"),
    "lfs-pointer": ("bad.jsonl", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "html": ("bad.jsonl", "<!DOCTYPE html><html></html>", "HTML"),
    "empty": ("bad.jsonl", "", "empty"),
    "blank-lines": ("bad.jsonl", "\n \n\n", "no rows"),
    "empty-array": ("bad.json", "[]", "no rows"),
    "unknown-suffix": ("bad.txt", GOOD, r"\.jsonl"),
    "missing-rejected": ("bad.jsonl", GOOD + without("rejected"), "2: column 'rejected': missing"),
    "null-chosen": ("bad.jsonl", GOOD + row(chosen=None), "2: column 'chosen'.*null"),
    "number-chosen": ("bad.jsonl", GOOD + row(chosen=3), "2: column 'chosen'.*the number 3"),
    "boolean-chosen": ("bad.jsonl", GOOD + row(chosen=True), "2: column 'chosen'.*boolean"),
    "object-chosen": ("bad.jsonl", GOOD + row(chosen={"text": "a"}), "2: column 'chosen'.*object"),
    "empty-chosen": ("bad.jsonl", GOOD + row(chosen=""), "2: column 'chosen'.*empty"),
    "blank-chosen": ("bad.jsonl", GOOD + row(chosen=" \n"), "2: column 'chosen'.*white space"),
    "empty-prompt": ("bad.jsonl", GOOD + row(prompt=""), "2: column 'prompt'.*empty"),
    "identical": ("bad.jsonl", GOOD + row(chosen=" no"), "2: column 'rejected': identical"),
    "nan-margin": ("bad.jsonl", GOOD + row(margin=float("nan")), "2: column 'margin'.*NaN"),
    "inf-margin": ("bad.jsonl", GOOD + row(margin=float("inf")), "2: column 'margin'.*finite"),
    "huge-margin": ("bad.jsonl", GOOD + row(margin=10**400), "2: column 'margin'.*finite"),
    "text-margin": ("bad.jsonl", GOOD + row(margin="big"), "2: column 'margin'.*number"),
    "boolean-margin": ("bad.jsonl", GOOD + row(margin=True), "2: column 'margin'.*boolean"),
    "wrong-label": (
        "bad.jsonl",
        '{"prompt": "a", "response_a": "b", "response_b": "c", "label": "A"}\n',
        "label.*'A'",
    ),
    "number-label": (
        "bad.jsonl",
        '{"prompt": "a", "response_a": "b", "response_b": "c", "label": 0}\n',
        "label",
    ),
    "no-label": (
        "bad.jsonl",
        '{"prompt": "a", "response_a": "b", "response_b": "c"}\n',
        "label.*missing",
    ),
    "both-forms": ("bad.jsonl", GOOD + row(response_a="x", response_b="y", label="a"), "2:.*both"),
    "chat-and-plain-sides": ("bad.jsonl", GOOD + row(chosen=CHAT), "2: column 'rejected'"),
    "chat-prompt-plain-sides": ("bad.jsonl", row(prompt=[CHAT[0]]), "1:.*conversation"),
    "mixed-rows": ("bad.jsonl", '{"text": "a"}\n' + turns(("user", "a"), ("assistant", "b")), "2:"),
    "plain-among-chat": (
        "bad.jsonl",
        row(prompt=[CHAT[0]], chosen=[CHAT[1]], rejected=[{**CHAT[1], "content": "bye"}]) + GOOD,
        "2: this row is plain text",
    ),
    "unknown-columns": ("bad.jsonl", '{"question": "a", "answer": "b"}\n', "rename"),
    "other-spelling": ("bad.jsonl", '{"Prompt": "a", "completion": "b"}\n', "rename 'Prompt'"),
    "unknown-role": (
        "bad.jsonl",
        turns(("human", "a"), ("gpt", "b")),
        "message 1: expected a role",
    ),
    "assistant-first": ("bad.jsonl", turns(("assistant", "a")), "message 1: expected role"),
    "two-users": (
        "bad.jsonl",
        turns(("user", "a"), ("user", "b"), ("assistant", "c")),
        "message 2",
    ),
    "user-last": ("bad.jsonl", turns(("user", "a")), "expected the last message"),
    "null-content": ("bad.jsonl", turns(("user", None), ("assistant", "b")), "message 1:.*null"),
    "no-messages": ("bad.jsonl", '{"messages": []}\n', "empty list"),
    "sharegpt": ("bad.jsonl", '{"messages": [{"from": "human", "value": "a"}]}\n', "rename from"),
    "messages-as-text": (
        "bad.jsonl",
        json.dumps({"messages": json.dumps(CHAT)}) + "\n",
        "list of messages",
    ),
    "tool-calls": (
        "bad.jsonl",
        json.dumps({"messages": [CHAT[0], {**CHAT[1], "tool_calls": [1]}]}) + "\n",
        "tool_calls is not supported",
    ),
    "images": ("bad.jsonl", GOOD + row(images=["x.png"]), "2: column 'images'.*not supported"),
    "implicit-nothing-common": ("bad.jsonl", '{"chosen": "abc", "rejected": "xyz"}\n', "no common"),
    "implicit-nothing-left": (
        "bad.jsonl",
        '{"chosen": "a b", "rejected": "a "}\n',
        "nothing follows",
    ),
    "unpaired": ("bad.jsonl", '{"prompt": "a", "completion": "b", "label": true}\n', "unpaired"),
    "csv-ragged": ("bad.csv", "prompt,chosen,rejected\na,b,c\nd,e\n", "3: expected 3 cells"),
    "csv-semicolons": ("bad.csv", "prompt;chosen;rejected\na;b;c\n", "commas"),
    "csv-open-quote": ("bad.csv", 'prompt,chosen,rejected\na,"b,c\n', "never closed"),
    "csv-column-twice": ("bad.csv", "prompt,prompt,rejected\na,b,c\n", "twice"),
    "csv-header-only": ("bad.csv", "prompt,chosen,rejected\n", "no rows"),
    "csv-list-as-text": (
        "bad.csv",
        f'messages\n"{json.dumps(CHAT).replace(chr(34), chr(34) * 2)}"\n',
        "CSV cannot hold lists",
    ),
    "parquet-damaged": ("bad.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", "damaged parquet"),
    "parquet-is-text": ("bad.parquet", GOOD, "not parquet"),
}


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
    from fastalign.data.rows import read_rows

    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], ['a, "b"\nc']])
    (only,) = read_rows(path, {"text"})
    assert not isinstance(only, ValueError)
    assert dict(only.values) == {"text": 'a, "b"\nc'}
