"""Data files: the files of a source, and their bytes, checked for damage before any parsing."""

import gzip
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from fastalign.data.readers.row import DataFault

FORMATS = ("jsonl", "json", "csv", "parquet")
# No model reads sixteen million characters; a longer line is a file of another kind.
MAX_ROW_BYTES = 16 * 2**20
MAX_JSON_BYTES = 2**30

_SPLIT_NAME = re.compile(r"(?:^|[-_./])(train|test|valid|validation|val|dev|eval)(?=[-_./\d]|$)")
_SPLITS = {"train": "train", "test": "test"}
_FOREIGN = (
    (b"\x1f\x8b", "gzip data (a gzipped file is named .jsonl.gz, .json.gz or .csv.gz, once)"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstandard data: unpack it"),
    (b"BZh", "bzip2 data: unpack it"),
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


def data_format(path: Path) -> tuple[str, bool] | None:
    """Return `(format, gzipped)` by the file's name; None if it is not that of a data file."""
    name = path.name.lower()
    gzipped = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix.removeprefix(".")
    if suffix not in FORMATS or (gzipped and suffix == "parquet"):
        return None
    return suffix, gzipped


def find_files(source: Path) -> list[Path]:
    """Return the file of a path, or all data files of a folder, sorted by name.

    Links to folders are not followed, since they can form loops; hidden files are left out.

    Raises:
        DataFault: if there is no data file, the suffix is unknown, a folder holds several splits,
            or the path is neither file nor folder.
        FileNotFoundError: if there is no such path.
    """
    try:
        mode = source.stat().st_mode
    except FileNotFoundError:
        broken = " (the link leads nowhere)" if source.is_symlink() else ""
        raise FileNotFoundError(f"{source}: no such file or folder{broken}") from None
    except (OSError, ValueError) as error:
        raise DataFault(str(source), f"cannot be opened: {error}") from None
    if stat.S_ISDIR(mode):
        return _files_of_folder(source)
    if not stat.S_ISREG(mode):
        raise DataFault(str(source), "expected a file or a folder, got a pipe or a device")
    if data_format(source) is None:
        known = ".jsonl, .json, .csv (each also .gz) or .parquet"
        got = source.suffix or "no suffix"
        raise DataFault(str(source), f"expected a name that ends in {known}, got {got}")
    return [source]


def _files_of_folder(folder: Path) -> list[Path]:
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        raise DataFault(str(folder), "written by save_to_disk: use to_parquet or to_json instead")
    found = []
    for root, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(root, name) for name in sorted(names) if not name.startswith(".")]
        found += [path for path in paths if data_format(path) is not None]
    if not found:
        raise DataFault(str(folder), "the folder holds no .jsonl, .json, .csv or .parquet file")
    splits: dict[str, Path] = {}
    for path in found:
        for name in _SPLIT_NAME.findall(path.relative_to(folder).as_posix().lower()):
            splits.setdefault(_SPLITS.get(name, "validation"), path)
    if len(splits) > 1:
        raise DataFault(
            str(folder),
            f"the folder holds several splits ({', '.join(sorted(splits))}); name one file",
        )
    return [find_files(path)[0] for path in found]


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


def _open(path: Path) -> IO[bytes]:
    known = data_format(path)
    assert known is not None, path
    with path.open("rb") as stream:
        head = stream.read(512)
    if not head:
        raise DataFault(str(path), "the file is empty")
    if not known[1]:
        refuse_foreign(str(path), head)
        return path.open("rb")
    if not head.startswith(b"\x1f\x8b"):
        raise DataFault(str(path), "the name ends in .gz but the content is not gzip")
    return cast("IO[bytes]", gzip.open(path, "rb"))


def _damaged(path: Path, error: Exception) -> DataFault:
    text = "the compressed file is cut off" if isinstance(error, EOFError) else str(error)
    return DataFault(str(path), f"damaged gzip: {text}")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    r"""Yield `(number from 1, bytes with their line end)`, split at `\n` alone.

    U+2028, U+0085 and similar are text, not line ends. A file whose only line ends are `\r` is
    split at those. A line longer than MAX_ROW_BYTES is cut to one byte more than that, so that
    the reader of the format can refuse it.

    Raises:
        DataFault: if the content is empty, damaged or of another format.
    """
    number = 0
    with _open(path) as stream:
        while True:
            try:
                line = stream.readline(MAX_ROW_BYTES + 1)
                rest = line
                while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
                    rest = stream.readline(MAX_ROW_BYTES + 1)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise _damaged(path, error) from None
            if not line:
                return
            number += 1
            if number == 1:
                refuse_foreign(str(path), line[:512])
                if not line.endswith(b"\n") and b"\r" in line.rstrip(b"\r"):
                    yield from enumerate(line.splitlines(keepends=True), start=1)
                    return
            yield number, line


def read_all(path: Path) -> bytes:
    """Return the whole (decompressed) content, of at most MAX_JSON_BYTES.

    Raises:
        DataFault: if the content is empty, damaged, larger or of another format.
    """
    with _open(path) as stream:
        try:
            content = stream.read(MAX_JSON_BYTES + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(path, error) from None
    if len(content) > MAX_JSON_BYTES:
        raise DataFault(str(path), "larger than 1 GiB: use .jsonl, which is read line by line")
    refuse_foreign(str(path), content[:512])
    return content


def decode(where: str, content: bytes) -> str:
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
