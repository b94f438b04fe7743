"""A source to checked examples: bad rows are raised or counted, and one file has one kind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fastalign.batch.packed import Group
from fastalign.data.columns import COLUMNS, Kind, kind_of
from fastalign.data.examples import Content, Example, SFTExample, parse
from fastalign.data.readers.row import DataFault
from fastalign.data.readers.rows import read_rows
from fastalign.data.report import DataReport

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


OnTooLong = Literal["error", "skip", "truncate"]


def fit(
    group: Group, source: str, report: DataReport, max_length: int, on_too_long: OnTooLong
) -> Group | None:
    """The group within `max_length`, or None where it is left out and counted."""
    num_prompt = len(group.prompt_ids)
    longest = num_prompt + max(len(response) for response in group.response_ids)
    if longest <= max_length:
        return group
    room = max_length - num_prompt
    if on_too_long == "truncate" and room >= 1:
        cut = [list(response[:room]) for response in group.response_ids]
        masks = group.response_loss_mask
        cut_masks = None if masks is None else [list(mask[:room]) for mask in masks]
        kept = Group(group.prompt_ids, cut, cut_masks)
        learned = all(kept.targets_of(number) for number in range(len(cut)))
        if learned and (len(cut) < 2 or cut[0] != cut[1]):
            report.num_truncated += 1
            return kept
    # What nothing would be left of to learn from cannot be truncated.
    refuse_long(report, source, longest, max_length, "error" if on_too_long == "error" else "skip")
    return None


def refuse(report: DataReport, fault: DataFault, on_bad_row: OnBadRow) -> None:
    """Raises the fault, or counts it."""
    if on_bad_row == "error":
        raise fault
    report.faults.append(fault)


def refuse_long(
    report: DataReport, source: str, length: int, max_length: int, on_too_long: str
) -> None:
    """Raises for a row over `max_length`, or counts it."""
    if on_too_long == "error":
        raise DataFault(
            source,
            f"expected at most {max_length} tokens (data.max_length), got {length}; raise it, or "
            "say what to do with such rows (--data.on-too-long)",
        )
    report.num_too_long += 1


def require_rows(report: DataReport) -> None:
    """Raises when nothing is left of a source."""
    if report.num_used == 0:
        why = report.losses_line() or f"{report.source}: no rows"
        first = f"; the first fault: {report.faults[0]}" if report.faults else ""
        raise DataFault(report.source, f"no row is left to use: {why}{first}")
