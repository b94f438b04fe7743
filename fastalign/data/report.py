"""Report on a source's rows: each is used, or counted with the reason why not."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastalign.data.readers.files import shown_entries
from fastalign.data.readers.row import DataFault, shorten, show_names
from fastalign.output import visible

if TYPE_CHECKING:
    from fastalign.batch.packed import Group


@dataclass
class DataReport:
    """Counts of one source.

    Attributes:
        source: the source as the caller gave it.
        num_rows: rows read, good and bad.
        num_used: rows that became examples.
        num_split: used rows of which each answer is an example of its own.
        num_examples_of_split: those examples.
        num_pairs_split: used comparisons that are two examples, a good and a bad answer.
        faults: bad rows, in the order of the file.
        forms: number of used rows for each set of columns.
        num_ties: used rows that are ties.
        num_ties_dropped: ties left out on request.
        num_too_long: rows left out because of their length.
        num_truncated: rows whose responses were truncated on request.
        num_crossing: rows in which a token would have crossed from the prompt into a response.
        num_duplicates: used rows with the same tokens as an earlier row.
        prompt_lengths: length of each used row's prompt.
        response_lengths: length of each used response.
        num_masked: answers in conversations that a key such as `weight` keeps from being learned.
        unread: entries of a folder that are not read, as paths within it.
        unused_columns: number of rows with each column that no example has.
        given_columns: number of rows with each column that goes to reward functions.
        absent_columns: columns that reward functions have a default for, and no row has.
        unknown_keys: number of messages with each key that nothing uses.
        unit: unit of the lengths: tokens, or characters without a tokenizer.
        parts: reports of the sources whose counts these are together; empty of one source.
    """

    source: str
    num_rows: int = 0
    num_used: int = 0
    num_split: int = 0
    num_examples_of_split: int = 0
    num_pairs_split: int = 0
    faults: list[DataFault] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)
    num_ties: int = 0
    num_ties_dropped: int = 0
    num_too_long: int = 0
    num_truncated: int = 0
    num_crossing: int = 0
    num_duplicates: int = 0
    prompt_lengths: array[int] = field(default_factory=lambda: array("i"))
    response_lengths: array[int] = field(default_factory=lambda: array("i"))
    num_masked: int = 0
    unread: list[str] = field(default_factory=list)
    unused_columns: Counter[str] = field(default_factory=Counter)
    given_columns: Counter[str] = field(default_factory=Counter)
    absent_columns: list[str] = field(default_factory=list)
    unknown_keys: Counter[str] = field(default_factory=Counter)
    unit: str = "tokens"
    parts: Sequence[DataReport] = ()

    @classmethod
    def joined(cls, parts: Sequence[DataReport]) -> DataReport:
        """Return the counts of several sources together."""
        whole = cls(", ".join(part.source for part in parts), unit=parts[0].unit, parts=parts)
        for name in vars(whole).keys() - {"source", "unit", "parts", "absent_columns"}:
            for part in parts:
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
        absent = parts[0].absent_columns
        whole.absent_columns = [c for c in absent if c not in whole.given_columns]
        return whole

    def add_lengths(self, group: Group) -> None:
        """Record the lengths of a used row."""
        self.prompt_lengths.append(len(group.prompt_ids))
        self.response_lengths.extend(map(len, group.response_ids))

    def as_dict(self) -> dict[str, Any]:
        """Return all but the source and the lengths, as JSON can hold it."""
        faults = [(fault.where, fault.problem, fault.column) for fault in self.faults]
        left_out = ("source", "prompt_lengths", "response_lengths", "parts")
        return {k: v for k, v in vars(self).items() if k not in left_out} | {"faults": faults}

    @classmethod
    def from_dict(cls, source: str, values: dict[str, Any]) -> DataReport:
        """Return the report that `as_dict` was made of, without lengths."""
        counters = ("forms", "unused_columns", "given_columns", "unknown_keys")
        counts = {name: Counter(values[name]) for name in counters}
        faults = [DataFault(*fault) for fault in values["faults"]]
        return cls(source, **values | counts | {"faults": faults})

    def lines(self) -> list[str]:
        """Return the report as lines of text, without the faults themselves."""
        source = visible(self.source)
        lines = [f"{source}: {self.num_used} of {self.num_rows} rows can be used"]
        lines += [f"  {count} x {form}" for form, count in self.forms.most_common()]
        counts = {
            "bad rows": len(self.faults),
            "ties": self.num_ties,
            "ties dropped": self.num_ties_dropped,
            "rows left out as too long": self.num_too_long,
            "rows truncated": self.num_truncated,
            "rows with a token across the boundary of prompt and response": self.num_crossing,
            "rows whose tokens are those of an earlier row": self.num_duplicates,
        }
        lines += [f"  {count} {name}" for name, count in counts.items() if count]
        for name in ("prompt", "response"):
            if lengths := getattr(self, f"{name}_lengths"):
                lines.append(f"  {name} {self.unit}: {length_summary(lengths)}")
        return lines + [f"  {line}" for line in self._unused_lines()]

    def _unused_lines(self) -> list[str]:
        """Return a line each about what is not read, not used or not one example."""
        lines = []
        if self.num_split:
            lines.append(
                f"{self.num_split} rows are {self.num_examples_of_split} examples, one of each "
                "answer: the chat template renders an earlier answer as no sampler gives it"
            )
        if self.num_pairs_split:
            lines.append(
                f"{self.num_pairs_split} comparisons are {2 * self.num_pairs_split} examples, a "
                "good and a bad answer each"
            )
        if self.num_masked:
            lines.append(f"{self.num_masked} answers are not learned, by a key of the message")
        if self.unread:
            lines.append(f"not read: {shown_entries(self.unread)}")
        if self.unused_columns:
            names = show_names(sorted(self.unused_columns))
            lines.append(f"columns that nothing uses: {names}")
            if "label" in self.unused_columns and any("completion" in form for form in self.forms):
                lines.append("a label beside a completion is used where it is true or false")
        if self.absent_columns:
            names = show_names(self.absent_columns)
            lines.append(f"no row has columns that rewards use the defaults of: {names}")
        if self.unknown_keys:
            counts = sorted(self.unknown_keys.items())
            names = ", ".join(f"{shorten(key)} ({count})" for key, count in counts[:8])
            lines.append(f"keys of messages that nothing uses: {names}")
        return lines

    def log_lines(self) -> list[str]:
        """Return the lines of a run's output: rows left out or truncated, and what is not used."""
        if self.parts:
            return [line for part in self.parts for line in part.log_lines()]
        source = visible(self.source)
        losses = self.losses_line()
        lines = [] if losses is None else [losses]
        lines += [f"{source}: {line}" for line in self._unused_lines()]
        return lines + [f"skipped: {fault}" for fault in self.faults[:5]]

    def print_losses(self) -> None:
        """Print the lines of a run's output."""
        for line in self.log_lines():
            print(line)

    def losses_line(self) -> str | None:
        """Return a log line about rows left out or truncated; None if there are none."""
        counts = {
            "bad": len(self.faults),
            "ties dropped": self.num_ties_dropped,
            "too long": self.num_too_long,
            "truncated": self.num_truncated,
        }
        parts = [f"{count} {name}" for name, count in counts.items() if count]
        if not parts:
            return None
        source = visible(self.source)
        return f"{source}: {self.num_used} of {self.num_rows} rows used ({', '.join(parts)})"


def length_summary(lengths: Sequence[int]) -> str:
    """Return quantiles as text."""
    ordered = sorted(lengths)

    def quantile(share: float) -> int:
        return ordered[round(share * (len(ordered) - 1))]

    return (
        f"min {ordered[0]}, median {quantile(0.5)}, 95% {quantile(0.95)}, max {ordered[-1]}, "
        f"total {sum(ordered)}"
    )
