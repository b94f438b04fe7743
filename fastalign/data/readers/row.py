"""The output of readers: a row with its location, or a fault with its location."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fastalign.output import visible

SHOWN_CHARACTERS = 40


class DataFault(ValueError):
    """Error for a defect of the data, in one line: file, line, column, expectation, value.

    Attributes:
        where: `file.jsonl:12`, `file.jsonl:12:40` (line and character) or the file alone.
        column: the column's name; None if the fault does not concern one column.
        problem: the expectation and the value.
    """

    def __init__(self, where: str, problem: str, column: str | None = None):
        name = "" if column is None else f"column {shorten(column)}: "
        super().__init__(visible(" ".join(f"{where}: {name}{problem}".split())))
        self.where = where
        self.column = column
        self.problem = problem


@dataclass(frozen=True)
class Row:
    """One row of a file, before any check of its columns.

    Attributes:
        where: `file.jsonl:12`; for a table without lines (parquet, hub) the row's number from 1.
        values: the columns by name.
        textual: True if every value is text because the format (CSV) has no other type.
    """

    where: str
    values: Mapping[str, object]
    textual: bool = False


def shorten(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Return the text in quotes on one line, control characters escaped, cut to `limit`."""
    if len(text) > limit:
        return f"{text[:limit]!r}..."
    return repr(text)


def show(value: object) -> str:
    """Describe a value in the terms of a data file, briefly enough for one line of a message."""
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
    """Return the column names in quotes, at most `limit` of them."""
    listed = [shorten(str(name)) for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return (", ".join(listed[:limit]) + more) or "none"
