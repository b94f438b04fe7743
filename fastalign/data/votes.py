"""The column `votes`: how many judges took each side of a comparison, and how many neither."""

import math
from dataclasses import dataclass

from fastalign.data.readers.row import DataFault, Row, show, show_names

_SIDES = ("a", "b", "tie")


@dataclass(frozen=True)
class Votes:
    """Counts of a comparison's votes; their sum is above 0."""

    a: float
    b: float
    tie: float

    def swapped(self) -> "Votes":
        """The same votes after the two responses changed places."""
        return Votes(self.b, self.a, self.tie)

    def shares(self) -> tuple[float, float, float]:
        """Of all votes: for the first response, for the second, for a tie."""
        total = self.a + self.b + self.tie
        return self.a / total, self.b / total, self.tie / total


def votes_of(row: Row) -> Votes | None:
    """The row's votes, or None where it has none; a missing `tie` counts 0.

    Raises:
        DataFault: no object of counts, a count below 0 or not finite, or no vote at all.
    """
    value = row.values.get("votes")
    if value is None or (row.textual and value == ""):
        return None
    if not isinstance(value, dict):
        remedy = "; CSV cannot hold objects, use .jsonl" if row.textual else ""
        problem = f"expected an object of counts {{a, b, tie}}, got {show(value)}{remedy}"
        raise DataFault(row.where, problem, "votes")
    named = {key for key, count in value.items() if count is not None}
    if not {"a", "b"} <= named <= set(_SIDES):
        problem = f"expected the keys a, b and tie, got {show_names(value)}"
        raise DataFault(row.where, problem, "votes")
    counts = [_count(row, side, value.get(side)) for side in _SIDES]
    if not sum(counts) > 0:
        raise DataFault(row.where, "expected at least one vote, got none", "votes")
    return Votes(*counts)


def _count(row: Row, side: str, value: object) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataFault(row.where, f"{side}: expected a count, got {show(value)}", "votes")
    if not 0 <= value <= 1e30 or not math.isfinite(value):
        problem = f"{side}: expected a finite count of at least 0, got {show(value)}"
        raise DataFault(row.where, problem, "votes")
    return float(value)
