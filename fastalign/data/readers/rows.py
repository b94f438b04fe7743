"""Rows and faults of a source (file, folder or hub name), whatever its format."""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastalign.data.readers.files import MEGABYTE, data_format, find_files
from fastalign.data.readers.json_rows import json_rows, jsonl_rows
from fastalign.data.readers.row import DataFault, Row, show
from fastalign.data.readers.table_rows import csv_rows, parquet_rows
from fastalign.in_memory import GivenRows
from fastalign.nearest import did_you_mean, nearest_path
from fastalign.progress import advance

_LOOKS_LOCAL = re.compile(
    r"^[./~]|\.(jsonl|ndjson|json|csv|parquet|gz|bz2|zst|txt|tsv|zip)$|\s|/.*/", re.I
)
ROWS_SHOWN = 256  # a phase is advanced by so many rows at a time
_HUB_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*(?:/[\w-][\w.-]*)?)"
    r"(?::(?P<config>[^:\[\]]+)(?=:))?"
    r"(?::(?P<split>\w+(?:\[[^\]]*\])?))?"
)


def read_rows(
    source: str | Path, columns: Collection[str] | None, unread: list[str]
) -> Iterator[Row | DataFault]:
    """Yield every row of a source, or instead of it the fault that made it unreadable.

    Args:
        source: a `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv` (each also `.gz`, `.bz2`, `.zst`) or
            `.parquet` file, a folder of them, a hub name `owner/name[:config][:split]` if no such
            path exists, or rows in memory.
        columns: the known columns; columnar formats read no others. None: all.
        unread: is extended by the entries of a folder that are not read.

    Raises:
        DataFault: if a whole file is faulty, so that its rows cannot be found or trusted.
        FileNotFoundError: if there is no such path, and it is not a hub name.
    """
    text = str(source)
    if not text.strip():
        raise DataFault("data", "expected a file, a folder or a hub name, got an empty name")
    if isinstance(source, GivenRows):
        yield from _not_empty(text, given_rows(source))
        return
    if is_on_hub(text):
        yield from _not_empty(text, hub_rows(text))
        return
    for file in find_files(Path(text).expanduser(), unread):
        known = data_format(file)
        assert known is not None, file
        if known[0] == "parquet":
            rows = parquet_rows(file, columns)
        elif known[0] in ("csv", "tsv"):
            rows = csv_rows(file, "\t" if known[0] == "tsv" else ",")
        else:
            rows = jsonl_rows(file) if known[0] == "jsonl" else json_rows(file)
        yield from _not_empty(str(file), rows)


def _not_empty(name: str, rows: Iterator[Row | DataFault]) -> Iterator[Row | DataFault]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataFault(name, "there are no rows")


def amount_of(source: str | Path) -> tuple[float | None, str]:
    """Return the amount and the unit by which reading a source advances a phase.

    Files are read by megabytes, and rows in memory or on the hub, whose number may not be known
    (None), by rows.

    Raises:
        DataFault, FileNotFoundError: as `find_files`.
    """
    if isinstance(source, GivenRows):
        return source.num_rows(), "rows"
    if is_on_hub(str(source)):
        return None, "rows"
    files = find_files(Path(source).expanduser(), [])
    return sum(file.stat().st_size for file in files) / MEGABYTE, "MB"


def is_hub_name(source: str) -> bool:
    """Return True for `owner/name`, `owner/name:split` and `owner/name:config:split`."""
    return _HUB_NAME.fullmatch(source) is not None


def is_on_hub(source: str) -> bool:
    """Return whether a source is a name of the hub: no such path is here, and it is like none."""
    here = os.path.lexists(Path(source).expanduser())
    return not here and is_hub_name(source) and not _LOOKS_LOCAL.search(source)


def hub_table(source: str) -> Any:
    """Return a hub data set; the split is `train` unless named.

    Raises:
        DataFault: if the hub (or its local cache) has no such data set, configuration or split.
    """
    match = _HUB_NAME.fullmatch(source)
    assert match is not None, source
    from datasets import load_dataset

    split = match["split"] or "train"
    try:
        return load_dataset(match["name"], match["config"], split=split)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataFault(
            source,
            f"no such file or folder here{did_you_mean(nearest_path(source))}, and not from the "
            f"hub: {reason}",
        ) from None


def given_rows(source: GivenRows) -> Iterator[Row | DataFault]:
    """Yield rows in memory; row number n, from 0, is located as `train_data[n]`."""
    for number, values in enumerate(source.rows):
        where = f"{source.argument}[{number}]"
        if not isinstance(values, Mapping):
            problem = f"expected a row, a dictionary of its columns, got {show(values)}"
            yield DataFault(where, problem)
        elif not all(isinstance(name, str) for name in values):
            yield DataFault(where, "expected text as the names of its columns")
        else:
            yield Row(where, values)
        if (number + 1) % ROWS_SHOWN == 0:
            advance(ROWS_SHOWN)


def hub_rows(source: str) -> Iterator[Row | DataFault]:
    """Yield the rows of a hub data set, numbered from 1 (see `hub_table`)."""
    table, number = hub_table(source), 0
    for number, values in enumerate(table, start=1):
        yield Row(f"{source}:{number}", values)
        if number % ROWS_SHOWN == 0:
            advance(ROWS_SHOWN)
    if number != len(table):
        raise DataFault(source, f"the data set lists {len(table)} rows, it gave {number}")
