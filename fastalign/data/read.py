"""Read a source without a tokenizer: checked examples, samples of `generate`, or all its text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastalign.data.columns import COLUMNS, Kind, kind_of
from fastalign.data.conversation import content
from fastalign.data.examples import Content, Example, SFTExample, parse
from fastalign.data.readers.row import DataFault
from fastalign.data.readers.rows import read_rows
from fastalign.data.report import DataReport

OnBadRow = Literal["error", "skip"]
_NO_TEXT = {"label", "votes", "margin"}


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


@dataclass(frozen=True)
class Sample:
    """An answer to a prompt.

    Attributes:
        prompt: plain text, or the messages.
        completion: may be empty: a model can end at once.
        values: the row as it stands in the file.
    """

    prompt: Content
    completion: str
    values: Mapping[str, object]


def read_samples(source: str | Path) -> list[Sample]:
    """Every row, in the file's order.

    Raises:
        DataFault: a row without a prompt or a completion.
    """
    samples = []
    for row in read_rows(source, COLUMNS):
        if isinstance(row, DataFault):
            raise row
        for name in ("prompt", "completion"):
            if name not in row.values:
                raise DataFault(row.where, "missing; samples have prompt and completion", name)
        completion = row.values["completion"]
        if not isinstance(completion, str):
            raise DataFault(row.where, "expected text", "completion")
        samples.append(Sample(content(row, "prompt"), completion, row.values))
    return samples


def load_samples(source: str | Path) -> list[tuple[Content, list[str]]]:
    """Each prompt with its completions, in the order of their first row.

    Raises:
        DataFault: as `read_samples`.
    """
    found: dict[Content, list[str]] = {}
    for sample in read_samples(source):
        found.setdefault(sample.prompt, []).append(sample.completion)
    return list(found.items())


def read_texts(source: str | Path) -> Iterator[str | DataFault]:
    """Yields the text of every known column, the contents of messages among them, and faults."""
    for row in read_rows(source, COLUMNS):
        if isinstance(row, DataFault):
            yield row
            continue
        for name in sorted(COLUMNS - _NO_TEXT):
            value = row.values.get(name)
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                contents = [m.get("content") for m in value if isinstance(m, dict)]
                yield from (text for text in contents if isinstance(text, str))
