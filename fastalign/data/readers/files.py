"""Data files: the files of a source, and their bytes, checked for damage before any parsing."""

import gzip
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from fastalign.data.readers.row import DataFault
from fastalign.nearest import did_you_mean, nearest_path
from fastalign.progress import advance

FORMATS = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "json",
    "csv": "csv",
    "tsv": "tsv",
    "parquet": "parquet",
}
_CODECS = {"gz": "gzip", "bz2": "bzip2", "zst": "zstandard"}
COMPRESSIONS = {"gz": b"\x1f\x8b", "bz2": b"BZh", "zst": b"\x28\xb5\x2f\xfd"}
KNOWN_NAMES = ".jsonl, .ndjson, .json, .csv, .tsv (each also .gz, .bz2, .zst) or .parquet"
# No model reads sixteen million characters; a longer line is a file of another kind.
MAX_ROW_BYTES = 16 * 2**20
MAX_JSON_BYTES = 2**30
_BLOCK_BYTES = 2**20
MEGABYTE = 10**6
# More white space at a time is a damaged file, or a small compressed one that never ends.
_MAX_BLANK_BLOCKS = 4

_SPLIT_NAME = re.compile(r"(?:^|[-_./])(train|test|valid|validation|val|dev|eval)(?=[-_./\d]|$)")
_SPLITS = {"train": "train", "test": "test"}
_FOREIGN = (
    (b"\x1f\x8b", "gzip data (a gzipped file is named .jsonl.gz, .json.gz or .csv.gz, once)"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstandard data (such a file is named .jsonl.zst, .csv.zst, once)"),
    (b"BZh", "bzip2 data (such a file is named .jsonl.bz2, .csv.bz2, once)"),
    (b"\xfd7zXZ\x00", "xz data: unpack it"),
    (b"PAR1", "parquet: name it .parquet"),
    (b"ARROW1", "an Arrow file: write it as parquet"),
    (b"SQLite format 3", "an SQLite database: export its table"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data: run `git lfs pull`"),
    (b"%PDF", "a PDF"),
    (b"\xff\xfe\x00\x00", "UTF-32 text: save it as UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text: save it as UTF-8"),
    (b"\xff\xfe", "UTF-16 text: save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text: save it as UTF-8"),
)


def data_format(path: Path) -> tuple[str, str] | None:
    """Return format and compression (empty: none) by the file's name; None if it is no data file.

    The format is one of the values of FORMATS, the compression a key of COMPRESSIONS.
    """
    parts = path.name.lower().split(".")
    compression = parts.pop() if parts[-1] in COMPRESSIONS else ""
    found = FORMATS.get(parts[-1]) if len(parts) > 1 else None
    if found is None or (compression and found == "parquet"):
        return None
    return found, compression


def find_files(source: Path, unread: list[str]) -> list[Path]:
    """Return the file of a path, or all data files of a folder, sorted by name.

    Links to folders are not followed, since they can form loops; hidden files are left out.

    Args:
        source: a file or a folder.
        unread: is extended by what a folder holds beside them, as paths within it.

    Raises:
        DataFault: if there is no data file, the suffix is unknown, a folder holds several splits
            or cannot be listed, or the path is neither file nor folder.
        FileNotFoundError: if there is no such path.
    """
    try:
        mode = source.stat().st_mode
    except FileNotFoundError:
        link = source.is_symlink()
        broken = " (the link leads nowhere)" if link else did_you_mean(nearest_path(source))
        raise FileNotFoundError(f"{source}: no such file or folder{broken}") from None
    except (OSError, ValueError) as error:
        raise DataFault(str(source), f"cannot be opened: {error}") from None
    if stat.S_ISDIR(mode):
        return _files_of_folder(source, unread)
    if not stat.S_ISREG(mode):
        raise DataFault(str(source), "expected a file or a folder, got a pipe or a device")
    if data_format(source) is None:
        got = source.suffix or "no suffix"
        raise DataFault(str(source), f"expected a name that ends in {KNOWN_NAMES}, got {got}")
    return [source]


def _files_of_folder(folder: Path, unread: list[str]) -> list[Path]:
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        raise DataFault(str(folder), "written by save_to_disk: use to_parquet or to_json instead")
    found, left = _walk(folder)
    if not found:
        held = f"; it holds {shown_entries(left)}" if left else ""
        raise DataFault(str(folder), f"the folder holds no {KNOWN_NAMES} file{held}")
    splits: dict[str, Path] = {}
    for path in found:
        for name in _SPLIT_NAME.findall(path.relative_to(folder).as_posix().lower()):
            splits.setdefault(_SPLITS.get(name, "validation"), path)
    if len(splits) > 1:
        raise DataFault(
            str(folder),
            f"the folder holds several splits ({', '.join(sorted(splits))}); name one file",
        )
    unread += left
    return [find_files(path, unread)[0] for path in found]


def _walk(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the data files below a folder, and its other entries as paths within it."""

    def refuse(error: OSError) -> None:
        raise DataFault(str(error.filename), f"cannot be listed: {error.strerror}") from None

    found, left = [], []
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=False):
        place = Path(root)
        hidden = [name for name in folders if name.startswith(".")]
        links = [name for name in folders if name not in hidden and (place / name).is_symlink()]
        folders[:] = sorted(set(folders).difference(hidden, links))
        others = [f"{name}/ (hidden)" for name in hidden]
        others += [f"{name}/ (a link to a folder)" for name in links]
        for name in sorted(names):
            if not name.startswith(".") and data_format(place / name) is not None:
                found.append(place / name)
            else:
                others.append(name)
        left += [(place.relative_to(folder) / name).as_posix() for name in others]
    return found, left


def shown_entries(names: list[str], limit: int = 8) -> str:
    """Return the number of files and their names, those that look like data first."""
    mentioned = re.compile(
        rf"\.({'|'.join([*FORMATS, *COMPRESSIONS])}|arrow|xz|zip)\b|a link to", re.I
    )
    ordered = sorted(names, key=lambda n: (n.startswith(".") or not mentioned.search(n), n))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} others: {', '.join(map(repr, ordered[:limit]))}{more}"


def refuse_foreign(where: str, head: bytes) -> None:
    """Raise DataFault if the first bytes are those of a known format other than UTF-8 text."""
    for magic, kind in _FOREIGN:
        if head.startswith(magic):
            raise DataFault(where, f"the content is {kind}")
    if head[257:262] == b"ustar":
        raise DataFault(where, "the content is a tar archive: unpack it")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataFault(where, "the content is HTML or XML: a failed download?")
    if len(head) >= 8 and (not any(head[1:64:2]) or not any(head[0:64:2])):
        raise DataFault(where, "the content is UTF-16 text: save it as UTF-8")


def _opened(path: Path, raw: IO[bytes]) -> Any:
    """Return a stream of the decompressed content of a file."""
    known = data_format(path)
    assert known is not None, path
    compression = known[1]
    head = raw.read(512)
    raw.seek(0)
    if not head:
        raise DataFault(str(path), "the file is empty")
    if not compression:
        refuse_foreign(str(path), head)
        return raw
    if not head.startswith(COMPRESSIONS[compression]):
        expected = f"the content is not {_CODECS[compression]}"
        raise DataFault(str(path), f"the name ends in .{compression} but {expected}")
    if compression == "gz":
        return cast("IO[bytes]", gzip.open(raw, "rb"))
    import pyarrow

    # The standard library's bz2 stops at damage between two streams as if it were the end.
    codec = {"bz2": "bz2", "zst": "zstd"}[compression]
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), codec)


def _damaged(path: Path, error: Exception) -> DataFault:
    known = data_format(path)
    if known is None or not known[1]:
        return DataFault(str(path), f"cannot be read: {error}")
    if isinstance(error, EOFError) or "Truncated" in str(error):
        return DataFault(str(path), "the compressed file is cut off")
    return DataFault(str(path), f"damaged {_CODECS[known[1]]}: {error}")


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield the decompressed content of a file, and prove that its end was reached.

    A `progress.phase` that is open is advanced by the megabytes of the file.

    Raises:
        DataFault: if the file is empty, damaged, of another format, or changes meanwhile.
    """
    first, num_blank, place = True, 0, 0
    with path.open("rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        stream = _opened(path, raw)
        while True:
            try:
                block = stream.read(_BLOCK_BYTES)
            except (OSError, EOFError, zlib.error) as error:
                raise _damaged(path, error) from None
            if not block:
                break
            if first and stream is not raw:
                refuse_foreign(str(path), block[:512])
            first = False
            num_blank = num_blank + 1 if block.isspace() else 0
            if num_blank > _MAX_BLANK_BLOCKS:
                raise DataFault(str(path), "more than 4 MiB of white space: is it damaged?")
            yield block
            advance((raw.tell() - place) / MEGABYTE)  # once its rows are taken
            place = raw.tell()
        if raw.tell() != size:
            problem = f"it had {size} bytes, {raw.tell()} were read: it changed meanwhile"
            raise DataFault(str(path), problem)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    r"""Yield `(number from 1, bytes with their line end)`, split at `\n`, `\r\n` and `\r`.

    U+2028, U+0085 and similar are text, not line ends. A line longer than MAX_ROW_BYTES is cut to
    one byte more than that, so that the reader of the format can refuse it.

    Raises:
        DataFault: if the content is empty, damaged or of another format.
    """
    number = num_read = num_given = 0
    rest, num_cut = b"", 0  # the last line, which may go on, and the bytes cut from its end
    blocks = _blocks(path)
    while True:
        block = next(blocks, b"")
        num_read += len(block)
        lines = (rest + block).splitlines(keepends=True)
        rest = lines.pop() if block else b""
        for line in lines:
            number += 1
            num_given += len(line) + num_cut
            num_cut = 0
            yield number, line[: MAX_ROW_BYTES + 1]
        if not block:
            break
        if len(rest) > MAX_ROW_BYTES and not rest.endswith((b"\n", b"\r")):
            num_cut += len(rest) - MAX_ROW_BYTES - 1
            rest = rest[: MAX_ROW_BYTES + 1]
    assert num_given == num_read, (path, num_given, num_read)


def read_all(path: Path) -> bytearray:
    r"""Return the whole (decompressed) content, of at most MAX_JSON_BYTES, its line ends `\n`.

    Raises:
        DataFault: if the content is empty, damaged, larger or of another format.
    """
    content = bytearray()
    for block in _blocks(path):
        content += block
        if len(content) > MAX_JSON_BYTES:
            raise DataFault(str(path), "larger than 1 GiB: use .jsonl, which is read line by line")
    return content.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in content else content


def decode(where: str, content: bytes | bytearray) -> str:
    """Decode UTF-8 without a byte-order mark; DataFault gives line and position of a wrong byte."""
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line_start = before.rfind(b"\n") + 1
        line = before.count(b"\n")
        place = f"{where}:{line + 1}" if line else where
        raise DataFault(
            f"{place}:{error.start - line_start + 1}",
            f"not UTF-8 (byte 0x{content[error.start]:02x}); is it Latin-1? save it as UTF-8",
        ) from None
