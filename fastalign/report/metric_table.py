"""The rows of a run's metrics, kept by columns: a dictionary a step takes six times the memory."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np

Row = dict[str, Any]
_MISSING: Any = object()


def number(value: Any) -> float | None:
    """Return a logged number or None; those that JSON lacks were written as text (`nan`, `inf`)."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


class MetricTable(Sequence[Row]):
    """Rows of metrics, each a dictionary made when it is asked for, and their columns as arrays."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._columns: dict[str, list[Any]] = {}
        self._numbers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._length = 0
        names: tuple[str, ...] = ()
        columns: list[list[Any]] = []
        for row in rows:
            if tuple(row) != names:
                names = tuple(row)
                columns = [self._columns.setdefault(name, []) for name in names]
                for column in columns:
                    column += [_MISSING] * (self._length - len(column))
            for column, value in zip(columns, row.values(), strict=True):
                column.append(value)
            self._length += 1

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._length

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """Return a row, or a list of those of a slice."""
        places = range(self._length)[index]
        if not isinstance(places, int):
            return [self[place] for place in places]
        there = {n: column[places] for n, column in self._columns.items() if places < len(column)}
        return {name: value for name, value in there.items() if value is not _MISSING}

    def logged(self, name: str) -> list[Any]:
        """Return the values of a metric in the rows that have it."""
        return [value for value in self._columns.get(name, []) if value is not _MISSING]

    def has(self, name: str) -> np.ndarray:
        """Return which rows have a metric, (number of rows,) bool."""
        found = np.zeros(self._length, bool)
        column = self._columns.get(name, [])
        found[: len(column)] = [value is not _MISSING for value in column]
        return found

    def numbers(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return in which rows a metric is a number, bool, and the numbers, float64, else NaN."""
        if name not in self._numbers:
            column = self._columns.get(name, [])
            found = [None if value is _MISSING else number(value) for value in column]
            values = np.full(self._length, np.nan)
            values[: len(column)] = found  # None becomes NaN
            known = np.zeros(self._length, bool)
            known[: len(column)] = [value is not None for value in found]
            self._numbers[name] = known, values
        return self._numbers[name]

    def arrays(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps at which a metric was logged as a number, and its values, (N,) each."""
        (is_step, steps), (known, values) = self._steps, self.numbers(name)
        kept = is_step & known
        return steps[kept], values[kept]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a metric was logged as a number, and its values."""
        steps, values = self.arrays(name)
        return steps.tolist(), values.tolist()

    @cached_property
    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Return which rows have a step, (number of rows,) bool, and the steps, 0 elsewhere."""
        found = [value if type(value) is int else None for value in self._columns.get("step", [])]
        found += [None] * (self._length - len(found))
        is_step = np.array([value is not None for value in found], bool)
        return is_step, np.array([value or 0 for value in found])
