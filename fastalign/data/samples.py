"""Rows that `fastalign generate` wrote: one by one, or gathered by prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastalign.data.columns import COLUMNS
from fastalign.data.conversation import content
from fastalign.data.examples import Content
from fastalign.data.readers.row import DataFault
from fastalign.data.readers.rows import read_rows


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
