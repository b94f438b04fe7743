"""Rows that `fastalign generate` wrote, gathered by prompt."""

from pathlib import Path

from fastalign.data.columns import COLUMNS
from fastalign.data.conversation import content
from fastalign.data.examples import Content
from fastalign.data.row import DataFault
from fastalign.data.rows import read_rows


def load_samples(source: str | Path) -> list[tuple[Content, list[str]]]:
    """Each prompt with its completions, in the order of their first row.

    A completion may be empty: a model can end at once.

    Raises:
        DataFault: a row without a prompt or a completion.
    """
    found: dict[Content, list[str]] = {}
    for row in read_rows(source, COLUMNS):
        if isinstance(row, DataFault):
            raise row
        for name in ("prompt", "completion"):
            if name not in row.values:
                raise DataFault(row.where, "missing; samples have prompt and completion", name)
        completion = row.values["completion"]
        if not isinstance(completion, str):
            raise DataFault(row.where, "expected text", "completion")
        found.setdefault(content(row, "prompt"), []).append(completion)
    return list(found.items())
