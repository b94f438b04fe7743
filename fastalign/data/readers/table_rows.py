"""Rows of CSV and TSV (the standard library, with line numbers) and of parquet (pyarrow)."""

import csv
from collections.abc import Collection, Iterator
from pathlib import Path

from fastalign.data.readers.files import (
    MAX_ROW_BYTES,
    MEGABYTE,
    decode,
    read_lines,
    refuse_foreign,
)
from fastalign.data.readers.row import DataFault, Row, show_names
from fastalign.progress import advance

_PARQUET_BATCH_ROWS = 256


def _csv_lines(path: Path) -> Iterator[str]:
    for number, line in read_lines(path):
        if len(line) > MAX_ROW_BYTES:
            size = MAX_ROW_BYTES // 2**20
            raise DataFault(f"{path}:{number}", f"the line is larger than {size} MiB")
        # A mark within the file is text: a cell of it alone is a row.
        mark = "\ufeff" if number > 1 and line.startswith(b"\xef\xbb\xbf") else ""
        yield mark + decode(f"{path}:{number}", line)


def csv_rows(path: Path, delimiter: str = ",") -> Iterator[Row | DataFault]:
    """Yield the rows of a `.csv` or `.tsv` file with double quotes and a header.

    A row is located by its first line.

    Raises:
        DataFault: if there is no usable header, or a quote is never closed.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(_csv_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            text = str(error)
            if "unexpected end" in text:
                text = "a quote is opened and never closed"
            raise DataFault(f"{path}:{start}", f"invalid CSV: {text}") from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _header(path, start, cells, delimiter)
        elif len(cells) != len(header):
            yield DataFault(
                f"{path}:{start}",
                f"expected {len(header)} cells, got {len(cells)}",
            )
        else:
            yield Row(f"{path}:{start}", dict(zip(header, cells, strict=True)), textual=True)


def _header(path: Path, line: int, cells: list[str], delimiter: str) -> list[str]:
    where = f"{path}:{line}"
    if len(cells) == 1 and any(mark in cells[0] for mark in ",;\t|"):
        marks = {",": "commas", "\t": "tabs"}[delimiter]
        raise DataFault(where, f"expected {marks} between the columns, got {show_names(cells)}")
    for index, name in enumerate(cells):
        if not name.strip() and index:
            raise DataFault(where, f"the header's cell {index + 1} has no name")
        if name in cells[:index]:
            raise DataFault(where, "the header has this column twice", column=name)
    return cells


def parquet_rows(path: Path, columns: Collection[str] | None) -> Iterator[Row | DataFault]:
    """Yield the rows of a `.parquet` file, numbered from 1; columns not in `columns` are None.

    All columns are read for `columns` of None. A `progress.phase` that is open is advanced by the
    megabytes of the file.

    Raises:
        DataFault: if it is not parquet or damaged, has a column twice, or has none of `columns`.
    """
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as stream:
        head = stream.read(512)
    if not head:
        raise DataFault(str(path), "the file is empty")
    if not head.startswith(b"PAR1"):
        refuse_foreign(str(path), head)
        raise DataFault(str(path), "the name ends in .parquet but the content is not parquet")
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        wanted = [name for name in names if columns is None or name in columns]
        for name in names:
            if names.count(name) > 1:
                raise DataFault(str(path), "the file has this column twice", column=name)
        if not wanted:
            raise DataFault(str(path), f"no column that is known; found {show_names(names)}")
        number = 0
        empty = dict.fromkeys(names)
        of_a_row = path.stat().st_size / MEGABYTE / max(1, table.metadata.num_rows)
        for batch in table.iter_batches(_PARQUET_BATCH_ROWS, columns=wanted):
            for index in range(batch.num_rows):
                number += 1
                yield _parquet_row(f"{path}:{number}", batch.slice(index, 1), empty)
            advance(batch.num_rows * of_a_row)
        if number != table.metadata.num_rows:
            problem = f"its footer lists {table.metadata.num_rows} rows, it holds {number}"
            raise DataFault(str(path), f"damaged parquet: {problem}")
    except DataFault:
        raise
    # pyarrow raises its own errors, OSError, and what Python's decoding of a value or name raises.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise DataFault(str(path), f"damaged parquet: {reason}") from None


def _parquet_row(where: str, batch: object, empty: dict[str, object]) -> Row | DataFault:
    values = dict(empty)
    for name, column in zip(batch.schema.names, batch.columns, strict=True):  # type: ignore[attr-defined]
        try:
            values[name] = column[0].as_py()
        except UnicodeDecodeError:
            return DataFault(where, "text that is not UTF-8", column=name)
        # A date beyond the year 9999, or a value of an extension that is not there.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:300]
            problem = f"a value of type {column.type} that cannot be read: {reason}"
            return DataFault(where, problem, column=name)
    return Row(where, values)
