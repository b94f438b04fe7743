"""What a reader hands on: one row with its place, or one fault that names the place."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

SHOWN_CHARACTERS = 40


class DataFault(ValueError):
    """A defect of the caller's data, in one line: file, line, column, expectation, value.

    Attributes:
        where: `file.jsonl:12`, `file.jsonl:12:40` (line and character) or the file alone.
        column: the column's name, or None when the fault is not about one column.
        problem: what was expected and what came.
    """

    def __init__(self, where: str, problem: str, column: str | None = None):
        name = "" if column is None else f"column {shorten(column)}: "
        super().__init__(" ".join(f"{where}: {name}{problem}".split()))
        self.where = where
        self.column = column
        self.problem = problem


@dataclass(frozen=True)
class Row:
    """One row as it stands in the file, before any check of its columns.

    Attributes:
        where: `file.jsonl:12`; for a table without lines (parquet, hub) the row's number from 1.
        values: the columns by name.
        textual: every value is text because the format (CSV) knows nothing else.
    """

    where: str
    values: Mapping[str, object]
    textual: bool = False


def shorten(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """The text in quotes on one line, control characters escaped, cut to `limit` characters."""
    if len(text) > limit:
        return f"{text[:limit]!r}..."
    return repr(text)


def show(value: object) -> str:
    """A value in the words of a data file, short enough for one line of a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, str):
        return shorten(value)
    if isinstance(value, int):
        return f"the number {value}" if abs(value) < 10**18 else "a huge number"
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else f"the number {value}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)} items"
    if isinstance(value, dict):
        return f"an object with the keys {show_names(value)}"
    return f"a value of type {type(value).__name__}"


def show_names(names: Mapping[str, object] | list[str], limit: int = 8) -> str:
    """Column names in quotes, at most `limit` of them."""
    listed = [shorten(str(name)) for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return (", ".join(listed[:limit]) + more) or "none"
