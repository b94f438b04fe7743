"""The report's section on comparisons by people: numbers, annotators, a learning curve."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalign.compare.results import person_rows, results, summary_rows, win_rate_lines
from fastalign.compare.store import Store
from fastalign.report.pictures import as_data_uri, label, new_figure, plain

SUFFIXES = (".db", ".sqlite", ".sqlite3")


@dataclass(frozen=True)
class Comparisons:
    """A database of comparisons.

    Attributes:
        name: the file's name.
        found: its results (`fastalign.compare.results`).
    """

    name: str
    found: dict[str, Any]

    @property
    def summary(self) -> list[tuple[str, str]]:
        """Rows of the numbers of everybody."""
        return summary_rows(self.found)

    @property
    def people(self) -> list[tuple[str, ...]]:
        """Rows of the annotators."""
        return person_rows(self.found)

    @property
    def win_rates(self) -> list[str]:
        """A line for each couple of models."""
        return win_rate_lines(self.found)


def is_comparisons(path: str) -> bool:
    """Return whether an argument of the report is a database of comparisons, by its name."""
    return Path(path).suffix in SUFFIXES


def read_comparisons(paths: Sequence[str]) -> list[Comparisons]:
    """Read databases of comparisons.

    Raises:
        ValueError: if a file is something else.
        FileNotFoundError: if there is none.
    """
    found = []
    for path in paths:
        store = Store(path)
        found.append(Comparisons(Path(path).name, results(store)))
        store.close()
    return found


def learning_curve(comparisons: Sequence[Comparisons]) -> str | None:
    """Draw the reward model's held-out accuracy against the number of labels, or return None."""
    curves = []
    for each in comparisons:
        fits = [fit for fit in each.found["fits"] if fit.get("accuracy") is not None]
        if fits:
            curves.append((each.name, fits))
    if not curves:
        return None
    figure, axes = new_figure(5.2, 3.6)
    for name, fits in curves:
        numbers = [fit["num_labels"] for fit in fits]
        (line,) = axes.plot(
            numbers, [fit["accuracy"] for fit in fits], "o-", markersize=4, label=plain(name)
        )
        bounds = ([fit[f"accuracy_{end}"] for fit in fits] for end in ("low", "high"))
        axes.fill_between(numbers, *bounds, color=line.get_color(), alpha=0.15, linewidth=0)
    return as_data_uri(label(figure, "labelled pairs", "held-out accuracy, 95 % interval"))
