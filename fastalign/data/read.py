"""Read a source without a tokenizer: checked examples, samples of `generate`, or all its text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fastalign.data.columns import COLUMNS, Kind, RowColumns, row_kind, unused_columns
from fastalign.data.conversation import content, unknown_keys
from fastalign.data.examples import (
    Content,
    Example,
    PromptExample,
    SFTExample,
    parse,
    style,
)
from fastalign.data.readers.row import DataFault, Row, show_names
from fastalign.data.readers.rows import read_rows
from fastalign.data.report import DataReport

OnBadRow = Literal["error", "skip"]
_NO_TEXT = {"label", "votes", "margin"}
NO_COLUMNS = RowColumns()


def read_examples(
    source: str | Path,
    kind: Kind | None,
    report: DataReport,
    *,
    on_bad_row: OnBadRow,
    columns: RowColumns = NO_COLUMNS,
) -> Iterator[Example]:
    """Yield the checked examples of a source; for a `kind` of None, that of the first good row.

    Faulty rows are added to the report; with `error` the first one is raised. All rows have to be
    plain text, or all conversations: a mixture is two exports in one file, and would train half
    of it wrongly. Prompts have the values of `columns`.

    Raises:
        DataFault: if a row is bad under `error`, or a whole file is, whatever `on_bad_row` is.
    """
    first: Example | None = None
    for row in read_rows(source, columns.names_to_read(), report.unread):
        report.num_rows += 1
        try:
            if isinstance(row, DataFault):
                raise row
            kind = kind or row_kind(row)
            example = parse(row, kind)
            first = first or example
            check_style(first, example)
            if columns and isinstance(example, PromptExample):
                example = replace(example, columns=columns.packed(row))
        except DataFault as fault:
            if on_bad_row == "error":
                raise
            report.faults.append(fault)
            continue
        given = columns.taken(row) if columns else {}
        report.given_columns.update(given.keys())
        unused = [name for name in unused_columns(row, kind) if name not in given]
        report.unused_columns.update(unused)
        for name, value in row.values.items():
            if isinstance(value, list) and name not in unused:
                report.unknown_keys.update(unknown_keys(value))
        if isinstance(example, SFTExample) and not isinstance(example.completion, str):
            answers = [turn for turn in example.completion if turn.role == "assistant"]
            report.num_masked += sum(not turn.learned for turn in answers)
        yield example


def require_columns(source: str | Path, columns: RowColumns) -> None:
    """Check that a row of a source has each required column; read no further than that.

    Raises:
        DataFault: if no row has one of them, or a whole file is faulty.
    """
    absent, seen = dict.fromkeys(columns.required), dict[str, None]()
    if not absent:
        return
    for row in read_rows(source, columns.names_to_read(), []):
        if not isinstance(row, DataFault):
            seen |= dict.fromkeys(row.values)
            absent = {name: None for name in absent if name not in row.values}
        if not absent:
            return
    name = next(iter(absent))
    problem = f"no row has it, but {columns.takers[name]} takes it; found {show_names(list(seen))}"
    raise DataFault(str(source), problem, name)


def check_style(first: Example, example: Example) -> None:
    """Raise DataFault unless a row is plain text, or a conversation, as the first row is."""
    before, found = (
        style(row.completion if isinstance(row, SFTExample) else row.prompt)
        for row in (first, example)
    )
    if found != before:
        problem = f"this row is {found} but {first.source} is {before}; one file has one kind"
        raise DataFault(example.source, problem)


@dataclass(frozen=True)
class Sample:
    """An answer to a prompt.

    Attributes:
        prompt: plain text, or the messages.
        completion: the answer; empty if the model ended at once.
        values: the columns of the row in the file.
        columns: those of them that reward functions take.
    """

    prompt: Content
    completion: str
    values: Mapping[str, object]
    columns: Mapping[str, object]


def _good_rows(source: str | Path, columns: RowColumns = NO_COLUMNS) -> Iterator[Row]:
    """Yield the rows of a source; print the entries of a folder that are not read."""
    report = DataReport(str(source))
    for row in read_rows(source, columns.names_to_read(), report.unread):
        if isinstance(row, DataFault):
            raise row
        yield row
    report.print_losses()


def read_samples(source: str | Path, columns: RowColumns = NO_COLUMNS) -> list[Sample]:
    """Read all rows, in the file's order, with the columns that reward functions take.

    Raises:
        DataFault: if a row has no prompt, no completion or no required column, or, where every
            column is taken, a value that JSON has not.
    """
    samples = []
    for row in _good_rows(source, columns):
        for name in ("prompt", "completion"):
            if name not in row.values:
                raise DataFault(row.where, "missing; samples have prompt and completion", name)
        completion = row.values["completion"]
        if not isinstance(completion, str):
            raise DataFault(row.where, "expected text", "completion")
        prompt = content(row, "prompt")
        if columns.every:
            columns.packed(row)
        samples.append(Sample(prompt, completion, row.values, columns.taken(row)))
    return samples


def load_samples(
    source: str | Path, columns: RowColumns = NO_COLUMNS
) -> dict[Content, list[Sample]]:
    """Return the samples of each prompt, in the order of their first row."""
    found: dict[Content, list[Sample]] = {}
    for sample in read_samples(source, columns):
        found.setdefault(sample.prompt, []).append(sample)
    return found


def read_texts(source: str | Path) -> Iterator[str]:
    """Yield the text of every known column, contents of messages included."""
    for row in _good_rows(source):
        for name in sorted(COLUMNS - _NO_TEXT):
            value = row.values.get(name)
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                contents = [m.get("content") for m in value if isinstance(m, dict)]
                yield from (text for text in contents if isinstance(text, str))
