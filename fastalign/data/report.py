"""What became of a source's rows: every row is used, or counted with the reason."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastalign.batch import Group
from fastalign.data.readers.row import DataFault


@dataclass
class DataReport:
    """Counts of one source.

    Attributes:
        source: as the caller wrote it.
        num_rows: rows read, good and bad.
        num_used: rows that became examples.
        faults: bad rows, in the order of the file.
        forms: used rows by their columns.
        num_ties: used rows that are ties.
        num_ties_dropped: ties left out because it was asked for.
        num_too_long: rows left out for their length.
        num_truncated: rows whose responses were cut, as asked.
        num_seams: rows in which a token would have crossed from the prompt into a response.
        num_duplicates: used rows whose tokens an earlier row has too.
        prompt_lengths: length of each used row's prompt.
        response_lengths: length of each used response.
        unit: what lengths count: tokens, or characters where there is no tokenizer.
    """

    source: str
    num_rows: int = 0
    num_used: int = 0
    faults: list[DataFault] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)
    num_ties: int = 0
    num_ties_dropped: int = 0
    num_too_long: int = 0
    num_truncated: int = 0
    num_seams: int = 0
    num_duplicates: int = 0
    prompt_lengths: list[int] = field(default_factory=list)
    response_lengths: list[int] = field(default_factory=list)
    unit: str = "tokens"

    def add_lengths(self, group: Group) -> None:
        """Notes the lengths of a used row."""
        self.prompt_lengths.append(len(group.prompt_ids))
        self.response_lengths += [len(response) for response in group.response_ids]

    def lines(self) -> list[str]:
        """The report for people, without the faults themselves."""
        lines = [f"{self.source}: {self.num_used} of {self.num_rows} rows can be used"]
        lines += [f"  {count} x {form}" for form, count in self.forms.most_common()]
        counts = {
            "bad rows": len(self.faults),
            "ties": self.num_ties,
            "ties dropped": self.num_ties_dropped,
            "rows left out as too long": self.num_too_long,
            "rows truncated": self.num_truncated,
            "rows with a token across the seam of prompt and response": self.num_seams,
            "rows whose tokens are those of an earlier row": self.num_duplicates,
        }
        lines += [f"  {count} {name}" for name, count in counts.items() if count]
        lines += [
            f"  {name}: {summary}"
            for name, summary in (
                (f"prompt {self.unit}", length_summary(self.prompt_lengths)),
                (f"response {self.unit}", length_summary(self.response_lengths)),
            )
            if summary
        ]
        return lines

    def losses_line(self) -> str | None:
        """One line with everything that was left out or cut, or None: for a run's log."""
        counts = {
            "bad": len(self.faults),
            "ties dropped": self.num_ties_dropped,
            "too long": self.num_too_long,
            "truncated": self.num_truncated,
        }
        parts = [f"{count} {name}" for name, count in counts.items() if count]
        if not parts:
            return None
        return f"{self.source}: {self.num_used} of {self.num_rows} rows used ({', '.join(parts)})"


def length_summary(lengths: Sequence[int]) -> str:
    """Quantiles in words, or an empty string for none."""
    if not lengths:
        return ""
    ordered = sorted(lengths)

    def quantile(share: float) -> int:
        return ordered[round(share * (len(ordered) - 1))]

    return (
        f"min {ordered[0]}, median {quantile(0.5)}, 95% {quantile(0.95)}, max {ordered[-1]}, "
        f"total {sum(ordered)}"
    )
