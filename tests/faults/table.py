"""The fault table: each row is declared on the test that proves it, and read from there."""

import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- rows: python -m tests.faults --write -->", "<!-- end of the rows -->"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Place:
    """How many processes a run has, and how they share its model."""

    num_ranks: int = 1
    strategy: str = "ddp"

    def __str__(self) -> str:
        return "1 process" if self.num_ranks == 1 else f"{self.num_ranks} ranks, {self.strategy}"


ALONE, DDP, FSDP, FSDP3 = Place(), Place(2), Place(2, "fsdp"), Place(3, "fsdp")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        fault: what is done to a run.
        places: where.
        does: what fastalign does; what stands in backquotes it says, `...` being anything.
        trl: what TRL 1.16 did.
    """

    fault: str
    places: Sequence[Place]
    does: str
    trl: str

    def cells(self) -> list[str]:
        return [self.fault, "; ".join(map(str, self.places)), self.does, self.trl]

    def unsaid(self, output: str) -> list[str]:
        """What the row quotes and a run did not say."""
        text = " ".join(output.split())
        quotes = re.findall("`([^`]+)`", self.does)
        patterns = {q: ".*".join(map(re.escape, q.split("..."))) for q in quotes}
        return [quote for quote, pattern in patterns.items() if not re.search(pattern, text)]


def fault(
    name: str, *where: Place, does: str, trl: str = NOT_MEASURED
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declares the row that a test proves; the test is given each `place`."""

    def declare(test: Any) -> Any:
        test.row = Row(name, where, does, trl)
        return pytest.mark.parametrize("place", where, ids=str)(test)

    return declare


def declared() -> list[Row]:
    """The rows of all tests, in the files' order."""
    rows: list[Row] = []
    for path in sorted(FOLDER.glob("test_*.py")):
        module = importlib.import_module(f"tests.faults.{path.stem}")
        rows += [value.row for value in vars(module).values() if hasattr(value, "row")]
    return rows


def as_markdown(rows: Iterable[Row], results: Mapping[Row, str]) -> str:
    lines = ["| fault | where | fastalign | result | TRL 1.16 |", "|---|---|---|---|---|"]
    for row in rows:
        name, where, does, trl = (cell.replace("|", r"\|") for cell in row.cells())
        lines.append(f"| {name} | {where} | {does} | {results.get(row, 'not run')} | {trl} |")
    return "\n".join(lines)


def with_table(document: str, table: str) -> str:
    """The document with the table in place of the one between its marks."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest
    assert after
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"
