"""The report's section on comparisons by people: numbers, annotators, a learning curve."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fastalign.compare.results import person_rows, results, summary_rows, win_rate_lines
from fastalign.compare.store import Store
from fastalign.report.pictures import Curve, Point, figure, scatter

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


def learning_curve(comparisons: Sequence[Comparisons]) -> Markup | None:
    """Draw the reward model's held-out accuracy against the number of labels, or return None."""
    curves = []
    for each in comparisons:
        fits = [fit for fit in each.found["fits"] if fit.get("accuracy") is not None]
        if fits:
            curves.append((each.name, fits))
    if not curves:
        return None
    lines, ends, points = [], [], []
    for place, (name, fits) in enumerate(curves):
        numbers = [fit["num_labels"] for fit in fits]
        lows, highs = ([fit[f"accuracy_{end}"] for fit in fits] for end in ("low", "high"))
        lines.append(Curve(numbers, [fit["accuracy"] for fit in fits], f"people-{place % 4}"))
        ends.append((numbers, lows, highs))
        points += [
            Point(
                *(fit["num_labels"], fit["accuracy"], f"people-{place % 4}"),
                f"{name}: {fit['num_labels']} labels, right on {fit['accuracy']:.1%} "
                f"({fit['accuracy_low']:.1%} to {fit['accuracy_high']:.1%})",
            )
            for fit in fits
        ]
    # The ends of the intervals are within the axes, too.
    frame = [Curve(xs, ys, "hidden") for xs, *both in ends for ys in both]
    axes = "labelled pairs", "held-out accuracy, 95 % interval"
    label = "Held-out accuracy of the reward model against the number of labelled pairs"
    plot = scatter(points, [*frame, *lines], axes, label, (520, 360))
    for line, end in zip(lines, ends, strict=True):
        plot.band(*end, line.css)
    names = [name for name, _ in curves]
    return figure(
        plot, [(line.css, "circle", name) for line, name in zip(lines, names, strict=True)]
    )
