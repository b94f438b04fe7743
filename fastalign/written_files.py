"""Outputs: files and folders that a command writes; they replace nothing that it did not make.

A command checks its outputs before it loads anything, and again when it writes them:

    out = check_file("out", config.out, overwrite=config.overwrite, inputs=input_paths(config))
    ...
    write_file(out, text, overwrite=config.overwrite)

A folder is written aside, flushed to the disk with a manifest of its files, and then renamed. By
the manifest a later call knows what an earlier call of the same run made.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from fastalign.data_sources import weighted_source

MANIFEST = "fastalign_manifest.json"  # in a folder that a command wrote
ADAPTER_CONFIG = "adapter_config.json"
# Last names of the settings whose text can be a file or folder to read.
READ = {
    *("path", "tokenizer", "sources", "reward", "best_of_reward", "template", "runs", "file"),
    "folder",
    *("train", "eval", "prompts", "pairs", "samples", "ptx_data", "token_file"),
}

Inputs = Sequence[tuple[str, Path]]  # each setting that names a path, and the path


def cache_folder(name: str) -> Path:
    """Return `fastalign/NAME` in the user's cache folder (XDG_CACHE_HOME)."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "fastalign" / name


def sha256_of(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a reader finds the old content or the new, never half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)  # there only if the disk is full or the like
    sync(path.parent)


def clear_half_written(path: Path) -> None:
    """Remove what processes that were killed had written of a file; no other may write it now."""
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink()


def entry_of(path: Path) -> dict[str, Any]:
    """Return a file's entry in a manifest: its size and its SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def fault_of_file(path: Path, size: int, digest: str) -> str | None:
    """Return how a file differs from its entry in a manifest, or None."""
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != size:
        return f"{path.name} has {path.stat().st_size} bytes, expected {size}"
    if sha256_of(path) != digest:
        return f"{path.name} is damaged (its SHA-256 differs)"
    return None


def input_paths(config: Any, prefix: str = "") -> list[tuple[str, Path]]:
    """Return each setting of a command that names a file or folder to read, with its path.

    The base of an adapter is among them.
    """
    found: list[tuple[str, Path]] = []
    for entry in fields(config):
        value, name = getattr(config, entry.name), f"{prefix}{entry.name}"
        if is_dataclass(value):
            found += input_paths(value, f"{name}.")
        elif entry.name in READ:
            for text in value if isinstance(value, tuple) else (value,):
                if entry.name == "train" and isinstance(text, str):
                    text = weighted_source(text).path
                if isinstance(text, str) and os.path.exists(os.path.expanduser(text)):
                    path = Path(text).expanduser().resolve()
                    found += [
                        (name, path),
                        *((f"{name}'s base", base) for base in local_base(path)),
                    ]
    return found


def local_base(path: Path) -> Iterator[Path]:
    """Yield the folder that an adapter's folder names as its base."""
    file = path / ADAPTER_CONFIG
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        return  # loading the adapter says what is wrong with it
    if isinstance(base, str) and os.path.exists(os.path.expanduser(base)):
        yield Path(base).expanduser().resolve()


def check_not_among_data(setting: str, path: Path, inputs: Inputs) -> None:
    """Raise ValueError if an output would lie in a folder whose files are all read as data."""
    around = (path.resolve(), *path.resolve().parents)
    for name, source in inputs:
        is_data = name.startswith("data.") or name.endswith(("ptx_data", ".samples"))
        if is_data and source.is_dir() and source in around:
            raise ValueError(
                f"{setting}: {path} is in {name} ({source}), a folder whose files are all read as "
                "data; choose another place"
            )


def check_file(setting: str, out: str | Path, *, overwrite: bool, inputs: Inputs = ()) -> Path:
    """Check that a command may write a file; create its folder.

    A pipe or a device, such as /dev/null, is written to as it is.

    Args:
        setting: the option that names the file, for messages.
        out: the file; a link is followed.
        overwrite: whether an existing file may be replaced, if it is no input.
        inputs: what the command reads.

    Raises:
        ValueError: if the file exists and may not be replaced, is a folder or an input, or would be
            in a folder of data.
        OSError: if its folder cannot be made or written.
    """
    path = Path(out)
    if path.is_dir():
        raise ValueError(f"{setting}: expected a file, {path} is a folder")
    if path.is_file() and not overwrite:
        raise ValueError(
            f"{setting}: {path} exists; --overwrite replaces it, or choose another name"
        )
    for name, source in inputs:
        if path.exists() and path.samefile(source):
            raise ValueError(f"{setting}: {path} is {name}, which is read; choose another name")
    check_not_among_data(setting, path, inputs)
    parent = path.resolve().parent
    above = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{setting}: expected a file in a folder, {above} is a file")
    parent.mkdir(parents=True, exist_ok=True)
    if not os.access(parent, os.W_OK) and not path.exists():
        raise PermissionError(f"{setting}: {parent} cannot be written")
    return path


def write_file(path: Path, content: str | bytes, *, overwrite: bool) -> None:
    """Write a file that `check_file` returned, atomically.

    Raises:
        ValueError: if something else made a file of that name meanwhile; this content is then in
            another one, which the message names.
    """
    if path.exists() and not path.is_file():  # a pipe or a device
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return
    real = path.resolve()
    if real.exists() and not overwrite:
        kept = real.with_name(f"{real.name}.{os.getpid()}")
        write_atomically(kept, content)
        raise ValueError(f"{path} was made by something else meanwhile; the result is in {kept}")
    write_atomically(real, content)


def read_manifest(folder: Path) -> tuple[str | None, dict[str, tuple[int, str]]] | None:
    """Return the run that wrote a folder, or None, and size and hash of each file, by its manifest.

    Without a manifest, or with a damaged one, return None.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        run, listed = manifest["run"], dict(manifest["files"])
        return run, {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def changed_file(folder: Path, entries: Mapping[str, tuple[int, str]]) -> str | None:
    """Return which file is not as the manifest lists it, in words, or None."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST or (path.is_dir() and not path.is_symlink()):
            continue
        if name not in entries or path.is_symlink():
            return f"{name} was added since the run made it"
        if fault_of_file(path, *entries[name]) is not None:
            return f"{name} was changed since the run made it"
    return None


def fault_of_folder(folder: Path, owner: str | None) -> str | None:
    """Return why a folder is not what the run `owner` made, or None; an empty one has no fault."""
    if not any(folder.iterdir()):
        return None
    found = read_manifest(folder)
    if found is None or owner is None or found[0] != owner:
        return "this run did not make it"
    return changed_file(folder, found[1])


def check_folder(
    setting: str,
    folder: Path,
    *,
    owner: str | None = None,
    overwrite: bool = False,
    inputs: Inputs = (),
) -> None:
    """Check that a folder may be written, or replaced.

    Args:
        setting: the option that names the folder, for messages.
        folder: the folder; a link is followed.
        owner: the run that may replace what it made itself; None for a command that makes it once.
        overwrite: whether the caller allowed to replace what is no input.
        inputs: what the command reads, and may not destroy.

    Raises:
        ValueError: if it may not be.
    """
    real, here = folder.resolve(), Path.cwd()
    if not real.exists():
        return
    if not real.is_dir():
        raise ValueError(f"{setting}: expected a folder, {folder} is a file")
    fault = fault_of_folder(real, owner)
    if fault is None:
        return
    if not overwrite:
        option = "--run.overwrite" if setting.startswith("run.") else "--overwrite"
        raise ValueError(
            f"{setting}: {folder} exists and is not an empty folder ({fault}); {option} replaces "
            "it, or choose another place"
        )
    for name, kept in (*inputs, ("the current folder", here), ("the home folder", Path.home())):
        if real == kept or real in kept.parents:
            raise ValueError(
                f"{setting}: {folder} is or holds {name} ({kept}), and is not replaced; choose "
                "another place"
            )


def begin_folder(final: Path, owner: str | None) -> Path:
    """Return the folder beside `final` that it is written in, after removing one that was left."""
    real = final.resolve()
    aside = real.with_name(f".writing-{real.name}-{owner or os.getpid()}")
    for left in (aside, aside.with_name(aside.name.replace(".writing-", ".removing-", 1))):
        if left.exists():  # by a call of this run that was killed
            shutil.rmtree(left)
    real.parent.mkdir(parents=True, exist_ok=True)
    return aside


def finish_folder(aside: Path, final: Path, owner: str | None) -> None:
    """Flush a folder that is written to the disk, with its manifest, and give it its name.

    What has that name, and the caller has checked, is removed once the new folder has taken it.
    """
    real = final.resolve()
    paths = sorted(path for path in aside.rglob("*") if path.is_file())
    files = {path.relative_to(aside).as_posix(): entry_of(path) for path in paths}
    text = json.dumps({"run": owner, "files": files}, indent=1) + "\n"
    (aside / MANIFEST).write_text(text, encoding="utf-8")
    ordinary = stat.S_IMODE((aside / MANIFEST).stat().st_mode)  # as the process's umask has it
    for path in (*paths, aside / MANIFEST):
        path.chmod(ordinary)  # safetensors writes files that their owner alone can read
        sync(path)
    for folder in (*(path for path in aside.rglob("*") if path.is_dir()), aside):
        sync(folder)
    if real.exists() and not any(real.iterdir()):  # perhaps the current folder: it stays the same
        for path in sorted(aside.iterdir(), key=lambda path: path.name == MANIFEST):
            path.rename(real / path.name)
        aside.rmdir()
        sync(real)
        return
    replaced = aside.with_name(aside.name.replace(".writing-", ".removing-", 1))
    if real.exists():
        real.rename(replaced)
    aside.rename(real)
    sync(real.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


@contextmanager
def written_folder(final: Path) -> Iterator[Path]:
    """Yield a folder to write into, which gets its final name when it is complete.

    If writing it fails, what was written is removed and what had the name stays.
    """
    aside = begin_folder(final, None)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finish_folder(aside, final, None)
