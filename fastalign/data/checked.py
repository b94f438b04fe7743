"""A source to checked examples: bad rows are raised or counted, and one file has one kind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fastalign.data.columns import COLUMNS, Kind, kind_of
from fastalign.data.examples import Content, Example, SFTExample, parse
from fastalign.data.report import DataReport
from fastalign.data.row import DataFault
from fastalign.data.rows import read_rows

OnBadRow = Literal["error", "skip"]


def read_examples(
    source: str | Path, kind: Kind | None, report: DataReport, *, on_bad_row: OnBadRow
) -> Iterator[Example]:
    """Yields the checked examples of a source; `None` takes the first good row's kind.

    Faulty rows go into the report; with `error` the first one is raised. All rows are plain text
    or all are conversations: a mixture is two exports in one file, and trains half of it wrongly.

    Raises:
        DataFault: a bad row under `error`; or whatever `on_bad_row` says, a fault of a whole file.
    """
    first: Example | None = None
    for row in read_rows(source, COLUMNS):
        report.num_rows += 1
        try:
            if isinstance(row, DataFault):
                raise row
            kind = kind or kind_of(row)
            example = parse(row, kind)
            first = first or example
            check_style(first, example)
        except DataFault as fault:
            if on_bad_row == "error":
                raise
            report.faults.append(fault)
            continue
        yield example


def check_style(first: Example, example: Example) -> None:
    """Refuses a conversation among plain rows and plain text among conversations.

    Raises:
        DataFault: the row differs from the first one.
    """
    styles = [isinstance(content_of(row), str) for row in (first, example)]
    if styles[0] != styles[1]:
        names = ["plain text" if plain else "a conversation" for plain in styles]
        raise DataFault(
            example.source,
            f"this row is {names[1]} but {first.source} is {names[0]}; one file has one kind",
        )


def content_of(example: Example) -> Content:
    """A part of the example that shows whether it is plain text or a conversation."""
    if isinstance(example, SFTExample):
        return example.completion
    return example.prompt
