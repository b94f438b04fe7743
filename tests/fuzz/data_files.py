"""Mutated data files: read to the end with every row counted, or refused in one line.

A file is made from a seed: rows of one kind, in one format, changed as rows, as text and as bytes.
The number of rows that it holds is counted by other means than the package's readers.
"""

import bz2
import csv
import gzip
import io
import json
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from fastalign.cli.data import CheckConfig, check
from fastalign.data.load import load_prompts
from tests.tokenizers import make_tokenizer

Rows = list[dict[str, Any]]
SUFFIXES = ("jsonl", "json", "csv", "tsv", "ndjson", "parquet")
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**70, 1.5, float("nan"), float("inf"), "", " ", "\0", "\ufeff", "\u202e"),
    *([], {}, [1], ["a", None], {"role": "user"}, [{"role": "user", "content": 3}], "x" * 5000),
    *([{"role": "user", "content": "a"}], [{"role": "robot", "content": "a"}] * 2, "\r", "a\r\nb"),
    *("\x1b[2J", "\ud800", 'say "hi"', "a,b;c\td", "\u2028", "\x85", "\x1c", "e\u0301"),
)
ODD_TEXTS = ("\r", "\n", "\r\n", "\0", '"', "'", ",", "\t", "{", "}", "[", "]", ":", "\\", "NaN")
ODD_TEXTS += ("\ufeff", "\u2028", "\x85", "\x0b", "\x1c", "null", "1e999", "[" * 1500, "\\ud800")


def text(chance: random.Random) -> str:
    words = ("good", "bad", "phone", "the", "caf\u00e9", "\u65e5\u672c", "a b", "yes", "no", "x\ny")
    return " ".join(chance.choice(words) for _ in range(chance.randint(1, 6)))


def turns(chance: random.Random, last: str) -> list[dict[str, str]]:
    roles = ["system"] * chance.randint(0, 1) + ["user", "assistant"] * chance.randint(1, 2)
    roles = roles if last == "assistant" else roles[:-1]
    return [{"role": role, "content": text(chance)} for role in roles]


KINDS: tuple[Callable[[random.Random], dict[str, Any]], ...] = (
    lambda c: {"text": text(c)},
    lambda c: {"prompt": text(c), "completion": text(c)},
    lambda c: {"prompt": text(c), "chosen": text(c) + " +", "rejected": text(c) + " -"},
    lambda c: {"messages": turns(c, "assistant")},
    lambda c: {
        "prompt": text(c),
        "response_a": text(c) + " a",
        "response_b": text(c) + " b",
        "label": c.choice(["a", "b", "tie"]),
    },
    lambda c: {"prompt": turns(c, "user"), "completion": text(c), "answer": text(c)},
)


def change_rows(chance: random.Random, rows: Rows) -> None:
    """Change a value, a key, or the rows' order and number."""
    row = chance.choice(rows)
    key = chance.choice(list(row) or ["prompt"])
    match chance.randrange(7):
        case 0:
            row[key] = chance.choice(ODD_VALUES)
        case 1:
            row.pop(key, None)
        case 2:
            row[chance.choice(["prompt", "Prompt", "", "answer", "\x1b", "margin"])] = row.get(key)
        case 3:
            rows.append(dict(row))
        case 4:
            chance.shuffle(rows)
        case 5:
            for each in rows:
                each[key] = chance.choice(ODD_VALUES)
        case 6:
            row[key] = text(chance) * 300


def as_text(chance: random.Random, rows: Rows, suffix: str) -> str:
    """The rows in a text format; lines end as one system, or several, end them."""
    if suffix in ("csv", "tsv"):
        out = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        end = chance.choice(["\n", "\r\n", "\r"])
        mark = "\t" if suffix == "tsv" else ","
        writer = csv.DictWriter(out, names, delimiter=mark, lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()
    ascii_only = chance.random() < 0.5
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    if suffix == "json" and chance.random() < 0.8:
        return "[" + chance.choice([",", ",\n", " , "]).join(lines) + "]"
    return "".join(line + chance.choice(["\n", "\n", "\r\n", "\r"]) for line in lines)


def change_text(chance: random.Random, content: str) -> str:
    """Insert, delete, repeat or exchange characters or lines."""
    place = chance.randint(0, len(content))
    length = chance.choice([1, 1, 2, 8, 60])
    lines = content.splitlines(keepends=True)
    match chance.randrange(7):
        case 0:
            return content[:place] + chance.choice(ODD_TEXTS) + content[place:]
        case 1:
            return content[:place] + content[place + length :]
        case 2:
            return content[:place] + content[place : place + length] * 3 + content[place:]
        case 3 if len(lines) > 1:
            del lines[chance.randrange(len(lines))]
        case 4 if lines:
            lines.insert(chance.randrange(len(lines)), chance.choice(["\n", "  \n", "\r", "#\n"]))
        case 5:
            return content.replace("\n", chance.choice(["\r", "\r\n", "\n\n", "\r\r\n", "\x0b"]))
        case 6:
            return chance.choice(["", "\ufeff", "\n\n"]) + content[:place]
    return "".join(lines)


def change_bytes(chance: random.Random, content: bytes) -> bytes:
    """Flip, cut, insert, repeat or zero bytes, as damaged disks and broken copies do."""
    place = chance.randint(0, max(len(content) - 1, 0))
    length = chance.choice([1, 1, 4, 64, 512])
    match chance.randrange(6):
        case 0:
            flipped = bytes(b ^ (1 << chance.randrange(8)) for b in content[place : place + 1])
            return content[:place] + flipped + content[place + 1 :]
        case 1:
            return content[:place]
        case 2:
            return content[:place] + chance.randbytes(length) + content[place:]
        case 3:
            return content[:place] + content[place + length :]
        case 4:
            return content[:place] + bytes(length) + content[place + length :]
    return content + chance.choice([content, b"\n", b"\0" * 20, chance.randbytes(30)])


def parquet(chance: random.Random, rows: Rows) -> bytes:
    """The rows as parquet; values that pyarrow does not take become text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns: dict[str, Any] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            columns[name] = pyarrow.array([repr(value) for value in values])
    if chance.random() < 0.1:
        when = pyarrow.array([2**50] * len(rows), pyarrow.timestamp("ms"))
        columns[chance.choice(["prompt", "when"])] = when
    if chance.random() < 0.1:
        columns["prompt"] = pyarrow.array([datetime(2024, 1, 2)] * len(rows))
    options = {
        "row_group_size": chance.choice([1, 3, 100]),
        "compression": chance.choice(["snappy", "none", "zstd"]),
    }
    out = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), out, **options)
    except pyarrow.ArrowException:  # parquet lacks a type, an object without keys say
        out = io.BytesIO()
        plain = {name: [repr(row.get(name)) for row in rows] for name in names}
        pyarrow.parquet.write_table(pyarrow.table(plain), out, **options)
    return out.getvalue()


def compressed(content: bytes, compression: str) -> bytes:
    if compression == "gz":
        return gzip.compress(content, mtime=0)
    if compression == "bz2":
        return bz2.compress(content)
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


@dataclass(frozen=True)
class Case:
    """A file that a seed stands for."""

    name: str
    content: bytes


def make_case(seed: int) -> Case:
    chance = random.Random(seed)
    make = chance.choice(KINDS)
    rows = [make(chance) for _ in range(chance.choice([1, 2, 5, 12, 40, 300]))]
    suffix = chance.choice(SUFFIXES)
    for _ in range(chance.choice([0, 0, 1, 2])):
        change_rows(chance, rows)
    encoding = "utf-8"
    if suffix == "parquet":
        content = parquet(chance, rows)
    else:
        written = as_text(chance, rows, suffix)
        for _ in range(chance.choice([0, 0, 1, 2])):
            written = change_text(chance, written)
        if chance.random() < 0.08:
            encoding = chance.choice(["utf-16", "utf-8-sig", "latin-1", "utf-32", "cp1252"])
        errors = "surrogatepass" if encoding.startswith("utf") else "replace"
        content = written.encode(encoding, errors)
    for _ in range(chance.choice([0, 0, 0, 1, 2])):
        content = change_bytes(chance, content)
    name = f"{seed}.{suffix}"
    if suffix != "parquet" and chance.random() < 0.4:
        compression = chance.choice(["gz", "bz2", "zst"])
        name += f".{compression}"
        content = compressed(content, compression)
        if chance.random() < 0.1:
            content += compressed(chance.randbytes(20), compression)
        if chance.random() < 0.3:
            content = change_bytes(chance, content)
    if chance.random() < 0.02:
        name = chance.choice([f"{seed}.jsonl", f"{seed}.csv.gz", f"{seed}.txt", f"{seed}.parquet"])
    return Case(name, content)


def count_rows(path: Path) -> int | None:
    """The rows that a file holds, counted without the package; None: it is no such file."""
    content = path.read_bytes()
    kinds = path.name.split(".")[1:]
    try:
        if kinds[0] == "parquet":
            return int(pyarrow.parquet.read_metadata(path).num_rows)
        if kinds[1:] == ["gz"]:
            content = gzip.decompress(content)
        elif kinds[1:] == ["bz2"]:
            content = bz2.decompress(content)
        elif kinds[1:] == ["zst"]:
            content = pyarrow.input_stream(io.BytesIO(content), compression="zstd").read()
        content = content.removeprefix(b"\xef\xbb\xbf")
        if kinds[0] in ("csv", "tsv"):
            mark = "\t" if kinds[0] == "tsv" else ","
            cells = csv.reader(io.StringIO(content.decode(), newline=""), delimiter=mark)
            return sum(bool(row) for row in cells) - 1
        if kinds[0] == "json" and content.lstrip().startswith(b"["):
            return len(json.loads(content))
    except (ValueError, OSError, EOFError, RecursionError, zlib.error, csv.Error):
        return None
    mark = b"\xef\xbb\xbf"  # which alone in a line of JSON is no row
    lines = re.split(b"\r\n|\n|\r", content)
    return sum(bool(line.removeprefix(mark).strip(b" \t")) for line in lines)


def outcome(seed: int, folder: Path, encoder_too: bool = False) -> str:
    """Read the case's file; return what became of it.

    Raises:
        AssertionError: if rows were lost, or a message is not one line of sensible length.
    """
    case = make_case(seed)
    path = folder / case.name
    path.write_bytes(case.content)
    report = check(CheckConfig(str(path)))
    for fault in report.faults:
        line = str(fault)
        assert len(line.splitlines()) == 1, f"not one line: {line!r}"
        assert len(line.replace(str(path), "")) < 700, f"a message of {len(line)} characters"
    assert report.num_used + len(report.faults) >= report.num_rows
    assert report.lines()
    stopped = bool(report.faults) and "(stopped here)" in report.faults[-1].problem
    if not stopped:
        rows = count_rows(path)
        assert rows == report.num_rows, f"{rows} rows there, {report.num_rows} counted"
        assert report.num_used + len(report.faults) == rows
    if encoder_too:
        try_prompts(path)
    path.unlink()
    if stopped:
        return "refused in one line" if not report.num_used else "refused after some rows"
    return "read, bad rows named" if report.faults else "read whole"


@cache
def chat_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return tokenizer


def try_prompts(path: Path) -> None:
    """Tokenise the file's prompts; a ValueError is a refusal."""
    try:
        load_prompts(path, chat_tokenizer(), max_length=50, on_bad_row="skip", on_too_long="skip")
    except ValueError as error:
        if len(str(error).splitlines()) != 1:
            raise AssertionError(f"not one line: {error!r}") from error
