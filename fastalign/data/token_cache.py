"""Rows as tokens in an Arrow file of the cache folder, which every rank and later run maps.

A file is named by a hash of all that its rows depend on: the source's content, the tokenizer with
its chat template, the rules, and the versions of what computes them. The first process that needs
it writes it under a lock, while others (ranks of the run, other runs) wait; a folder that several
machines do not share has one writer each. Beside `NAME.arrow`, `NAME.json` holds the report and the
file's SHA-256. It is written last, so that what a killed process leaves is never read.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastalign.data.readers.files import find_files
from fastalign.data.readers.row import DataFault
from fastalign.data.readers.rows import hub_table, is_on_hub
from fastalign.in_memory import GivenRows
from fastalign.written_files import (
    cache_folder,
    clear_half_written,
    entry_of,
    fault_of_file,
    sha256_of,
    sync,
    write_atomically,
)

# A smaller source is tokenised at each start, by this process alone, in about a second.
LARGE_BYTES = 2 * 2**20
LARGE_ROWS = 2048  # of a hub data set, or of rows in memory

Write = Callable[[Any], None]  # writes a record batch
# (write, number of processes) -> the report and the fingerprint
Tokenise = Callable[[Write, int], dict[str, Any]]


class CannotKeepError(Exception):
    """Error for a cache folder that cannot be written."""


def load_tokens(
    source: str | Path, basis: Callable[[], tuple[Any, Any]], tokenise: Tokenise
) -> tuple[Any, dict[str, Any]]:
    """Return the table of a source's rows, and what `tokenise` returned for them.

    Args:
        source: a file, a folder, a hub name or rows in memory. Of these a `datasets.Dataset` is
            kept under its fingerprint; others are tokenised at each start.
        basis: returns what the tokens depend on beside the source, the tokenizer and the rules,
            each with a `repr` of its own. Without a tokenizer (None: its own code decides) nothing
            is kept.
        tokenise: writes the rows.

    Raises:
        ValueError: if the source is at fault, or changes while it is read.
    """
    before = stamps(source)
    number = len(os.sched_getaffinity(0))
    each = max(1, number // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # where every rank works
    if before is None:
        large = isinstance(source, GivenRows) and (source.num_rows() or 0) > LARGE_ROWS
        return in_memory(tokenise, each if large else 1)
    found = basis()
    if found[0] is None:
        return in_memory(tokenise, each)
    path = cache_folder("tokens") / f"{key_of(source, before, found)}.arrow"
    kept = read_kept(path, source)
    if kept is not None:
        return kept
    try:
        with locked(path):
            kept = read_kept(path, source) or keep(path, source, tokenise, number)
    except CannotKeepError as error:
        print(f"{source}: tokens are not kept for later runs: {error}")
        kept = in_memory(tokenise, each)
    if stamps(source) != before:
        for file in (path, path.with_suffix(".json")):
            file.unlink(missing_ok=True)
        raise DataFault(str(source), "it changed while it was read")
    return kept


def stamps(source: str | Path) -> list[Any] | None:
    """Return what tells whether a source changed, for each of its files; None: it is not kept."""
    if isinstance(source, GivenRows):
        content = source.content()
        return None if content is None or (source.num_rows() or 0) <= LARGE_ROWS else [content]
    if is_on_hub(str(source)):
        table = hub_table(str(source))
        return [table._fingerprint] if len(table) > LARGE_ROWS else None
    files = find_files(Path(source).expanduser(), [])
    found = [(str(file), file.stat()) for file in files]
    if sum(stat.st_size for _, stat in found) < LARGE_BYTES:
        return None
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found]


def key_of(source: str | Path, stamps: list[Any], basis: tuple[Any, Any]) -> str:
    """Return the name of the file for a source's content under a tokenizer and rules."""
    is_table = isinstance(source, GivenRows) or is_on_hub(str(source))
    content = stamps if is_table else [(name, sha256_of(Path(name))) for name, *_ in stamps]
    unread: list[str] = []
    if not is_table:
        find_files(Path(source).expanduser(), unread)
    code = [sha256_of(file) for file in sorted(Path(__file__).parent.rglob("*.py"))]
    versions = [version(library) for library in ("transformers", "tokenizers")]
    parts = (str(source), content, unread, basis, code, versions)
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def writing() -> Iterator[None]:
    """Turn an OSError into CannotKeepError: a reader's OSError is another matter."""
    try:
        yield
    except OSError as error:
        raise CannotKeepError(str(error)) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file that is to be written."""
    with writing():
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("a")
    with lock:
        with writing():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed
            except BlockingIOError:
                print(f"waiting for another process, which tokenises into {path}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_kept(path: Path, source: str | Path) -> tuple[Any, dict[str, Any]] | None:
    """Map a file of the cache; None if it is not there, or damaged, which is printed."""
    import pyarrow

    notes = path.with_suffix(".json")
    if not notes.exists():
        return None
    try:
        meta = json.loads(notes.read_text(encoding="utf-8"))
        fault = fault_of_file(path, meta["bytes"], meta["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        fault = f"{notes.name}: {error}"
    if fault is not None:
        print(f"{source}: damaged cache of tokens in {path.parent} ({fault}); tokenised again")
        return None
    table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
    print(f"{source}: the tokens of {len(table)} rows are those of an earlier start ({path})")
    return table, meta


def keep(
    path: Path, source: str | Path, tokenise: Tokenise, number: int
) -> tuple[Any, dict[str, Any]]:
    """Tokenise a source into a file of the cache, whose lock is held, and map it.

    Raises:
        CannotKeepError: if it cannot be written.
    """
    import pyarrow

    start = time.perf_counter()
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with writing():
        clear_half_written(path)
    try:
        with writing():
            sink = pyarrow.OSFile(str(aside), "wb")
        with sink:
            meta = write_rows(sink, tokenise, number)
        with writing():
            sync(aside)
            aside.replace(path)
            meta |= entry_of(path)
            write_atomically(path.with_suffix(".json"), json.dumps(meta))
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
    print(
        f"{source}: {len(table)} rows tokenised in {time.perf_counter() - start:.1f} s by {number} "
        f"processes; later runs read {path} ({meta['bytes'] / 2**20:.0f} MiB)"
    )
    return table, meta


def in_memory(tokenise: Tokenise, number: int) -> tuple[Any, dict[str, Any]]:
    """Tokenise a source into this process's memory."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    meta = write_rows(sink, tokenise, number)
    return pyarrow.ipc.open_file(sink.getvalue()).read_all(), meta


def write_rows(sink: Any, tokenise: Tokenise, number: int) -> dict[str, Any]:
    """Write the rows that `tokenise` gives into an Arrow file; return what it returned.

    Raises:
        CannotKeepError: if the file cannot be written.
    """
    import pyarrow

    writer: Any = None

    def write(rows: Any) -> None:
        nonlocal writer
        with writing():
            writer = writer or pyarrow.ipc.new_file(sink, rows.schema)
            writer.write_batch(rows)

    meta = tokenise(write, number)
    with writing():
        writer.close()
    return meta
