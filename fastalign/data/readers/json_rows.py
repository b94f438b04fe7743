"""Rows of JSON lines and of JSON arrays, each with its line number.

It is not left to a library because a fault has to be located by line and column, and because
libraries silently use the last of duplicated keys.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, dropwhile
from pathlib import Path

from fastalign.data.readers.files import MAX_ROW_BYTES, decode, read_all, read_lines
from fastalign.data.readers.row import DataFault, Row, shorten, show, show_names

_WHITESPACE = " \t\r\n"
_BLANK = re.compile(f"[{_WHITESPACE}]*")


class _DuplicatedKeyError(ValueError):
    """Error for a JSON object that has one key twice."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicatedKeyError(key)
            seen.add(key)
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _fault(where: str, error: Exception, hint: str = "") -> DataFault:
    """Return the fault for an error of the decoder; `where` already ends in the line number."""
    if isinstance(error, _DuplicatedKeyError):
        return DataFault(where, f"the key {shorten(str(error))} is there twice")
    if isinstance(error, RecursionError):
        return DataFault(where, "invalid JSON: nested too deeply")
    if isinstance(error, json.JSONDecodeError):
        place = f"{where}:{error.colno}"
        return DataFault(place, f"invalid JSON: {error.msg}{hint}")
    return DataFault(where, f"invalid JSON: {error}")


def _hint(text: str, error: Exception, last: bool) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return ""
    rest = text[error.pos :].lstrip()
    if error.msg == "Extra data":
        if rest == ",":
            return ": a comma after the object"
        return ": two objects on one line" if rest.startswith("{") else ""
    if text.startswith("{'"):
        return ": strings are written in double quotes (a printed Python dict?)"
    if error.msg.startswith("Invalid control character"):
        return r" (a raw line break, tab or NUL in a string is written \n, \t, \u0000)"
    return ": the file ends here; is it cut off?" if last and not rest else ""


def object_lines(name: str, lines: Iterable[tuple[int, bytes]]) -> Iterator[Row | DataFault]:
    """Yield one row per line that is not blank; for a faulty line, its fault.

    Raises:
        DataFault: if the first line shows that the file is not JSON lines.
    """
    first = True
    for number, line in lines:
        where = f"{name}:{number}"
        if len(line) > MAX_ROW_BYTES:
            yield DataFault(where, f"the row is larger than {MAX_ROW_BYTES // 2**20} MiB")
            first = False
            continue
        try:
            text = decode(where, line).strip(_WHITESPACE)
        except DataFault as fault:
            yield fault
            first = False
            continue
        if not text:
            continue
        if first and text in ("{", "[", "[{"):
            raise DataFault(
                where,
                "one JSON value is spread over lines: a .jsonl row is one line (an array of rows "
                "is named .json)",
            )
        first = False
        yield _object(where, text, last=not line.endswith((b"\n", b"\r")))


def _object(where: str, text: str, last: bool) -> Row | DataFault:
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return _fault(where, error, _hint(text, error, last))
    if isinstance(value, dict):
        return Row(where, value)
    array = "; an array of rows is named .json" if isinstance(value, list) else ""
    return DataFault(where, f"expected a JSON object on each line, got {show(value)}{array}")


def jsonl_rows(path: Path) -> Iterator[Row | DataFault]:
    """Yield the rows of a `.jsonl` file (see `object_lines`)."""
    return object_lines(str(path), read_lines(path))


def json_rows(path: Path) -> Iterator[Row | DataFault]:
    """Yield the rows of a `.json` file: an array of objects, or one object per line.

    Raises:
        DataFault: if the text is not such JSON. Text after a syntax error cannot be trusted, so
            reading stops there even if bad rows are skipped.
    """
    lines = dropwhile(lambda numbered: not numbered[1].strip(), read_lines(path))
    first = next(lines, None)
    if first is None:
        return
    if _is_object(first[1]):
        second = next(dropwhile(lambda numbered: not numbered[1].strip(), lines), None)
        if second is not None:
            yield from object_lines(str(path), chain([first, second], lines))
            return
    text = decode(str(path), read_all(path))
    start = _skip(text, 0)
    if text[start : start + 1] == "[":
        yield from _array_rows(path, text, start + 1)
    else:
        raise DataFault(str(path), f"expected a JSON array of objects, got {_top(text, start)}")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _top(text: str, start: int) -> str:
    try:
        value = json.loads(text[start:])
    except (ValueError, RecursionError):
        return shorten(text[start : start + 80])
    if isinstance(value, dict):
        return f"one object with the keys {show_names(value)}"
    return show(value)


def _skip(text: str, position: int) -> int:
    found = _BLANK.match(text, position)
    assert found is not None
    return found.end()


def _array_rows(path: Path, text: str, position: int) -> Iterator[Row | DataFault]:
    """Yield the elements of the array whose first one starts at or after `position`."""
    line, counted = 1, 0
    position = _skip(text, position)
    ends = text[position : position + 1] == "]"
    while not ends:
        line += text.count("\n", counted, position)
        counted = position
        where = f"{path}:{line}"
        try:
            value, position = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            cut = ": the file ends here; is it cut off?" if error.pos >= len(text.rstrip()) else ""
            raise _fault(f"{path}:{error.lineno}", error, cut) from None
        except (ValueError, RecursionError) as error:
            raise _fault(where, error) from None
        if isinstance(value, dict):
            yield Row(where, value)
        else:
            yield DataFault(where, f"expected a JSON object, got {show(value)}")
        position = _skip(text, position)
        ends = text[position : position + 1] == "]"
        if not ends:
            _expect_comma(path, text, position)
            position = _skip(text, position + 1)
    tail = _skip(text, position + 1)
    if tail < len(text):
        line = text.count("\n", 0, tail) + 1
        raise DataFault(f"{path}:{line}", f"after the array: {shorten(text[tail : tail + 80])}")


def _expect_comma(path: Path, text: str, position: int) -> None:
    if text[position : position + 1] == ",":
        return
    line = text.count("\n", 0, position) + 1
    if position >= len(text):
        raise DataFault(f"{path}:{line}", "the array is never closed; is the file cut off?")
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    got = shorten(text[position : position + 80])
    raise DataFault(f"{path}:{line}:{column}", f"invalid JSON: expected ',' or ']', got {got}")
