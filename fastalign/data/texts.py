"""All text of a source, whatever its columns: what a tokenizer is trained on."""

from collections.abc import Iterator
from pathlib import Path

from fastalign.data.columns import COLUMNS
from fastalign.data.readers.row import DataFault
from fastalign.data.readers.rows import read_rows

_NO_TEXT = {"label", "votes", "margin"}


def read_texts(source: str | Path) -> Iterator[str | DataFault]:
    """Yields the text of every known column, the contents of messages among them, and faults."""
    for row in read_rows(source, COLUMNS):
        if isinstance(row, DataFault):
            yield row
            continue
        for name in sorted(COLUMNS - _NO_TEXT):
            value = row.values.get(name)
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                contents = [m.get("content") for m in value if isinstance(m, dict)]
                yield from (text for text in contents if isinstance(text, str))
