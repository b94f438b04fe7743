"""A checkpoint's folder: published by a rename, verified by its hashes, removed when it is old."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from fastalign.ranks.world import ALONE, World
from fastalign.written_files import entry_of, fault_of_file, sync

CHECKPOINTS = "checkpoints"  # in a run's folder
MANIFEST = "manifest.json"
STATE = "state.json"
SHARD = ".safetensors"
ASIDE = ".writing-"
REMOVED = ".removing-"


def place_of(checkpoint: Path) -> tuple[int, int, int] | None:
    """Return a key that orders checkpoints by step, `step-000004` before `step-000004.1`.

    None for a folder that is not a checkpoint.
    """
    found = re.fullmatch(r"step-(\d+)(?:\.(\d+))?", checkpoint.name)
    if found is None:
        return None
    return int(found[1]), int(found[2] is None), int(found[2] or 0)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first, damaged ones included."""
    places = {path: place_of(path) for path in folder.glob("step-*")}
    found = [(place, path) for path, place in places.items() if place is not None]
    return [path for _, path in sorted(found, reverse=True)]


def clear_left_behind(folder: Path) -> None:
    """Remove folders that a killed run had begun to write or to remove."""
    for half in (*folder.glob(f"{ASIDE}*"), *folder.glob(f"{REMOVED}*")):
        shutil.rmtree(half)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint; once the removal has begun it is not listed any more."""
    hidden = checkpoint.with_name(f"{REMOVED}{checkpoint.name}")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def publish(
    aside: Path, final: Path, texts: dict[str, str], written: dict[str, Any], keep: int
) -> None:
    """Write the manifest of a folder of synced files, rename the folder, remove old checkpoints.

    At every moment a checkpoint that was good before is still there, or the new one is.

    `aside` holds the files of all ranks, of which `written` are the manifest's entries; `texts` are
    written to it, and it becomes `final`, `step-NNNNNN`. Of this checkpoint and older ones `keep`
    are kept; a newer one is left alone.
    """
    for name, text in texts.items():
        (aside / name).write_text(text, encoding="utf-8")
        sync(aside / name)
    manifest = written | {name: entry_of(aside / name) for name in texts}
    text = json.dumps(dict(sorted(manifest.items())), indent=1)
    (aside / MANIFEST).write_text(text, encoding="utf-8")
    sync(aside / MANIFEST)
    sync(aside)
    if final.exists():
        number = 1 + max((place_of(p) or (0, 0, 0))[2] for p in final.parent.glob("step-*"))
        final.rename(final.with_name(f"{final.name}.{number}"))
    aside.rename(final)
    sync(final.parent)
    place = place_of(final)
    assert place is not None
    older = [p for p in list_checkpoints(final.parent) if (place_of(p) or place) < place]
    replaced = [path for path in older if path.name.startswith(f"{final.name}.")]
    others = [path for path in older if path not in replaced]
    for old in (*replaced, *others[keep - 1 :]):
        discard(old)


def read_manifest(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of every file that a checkpoint should hold.

    Raises:
        ValueError: if the manifest is damaged.
    """
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{MANIFEST} is missing")
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is damaged") from error
    if STATE not in expected:
        raise ValueError(f"{MANIFEST} does not list {STATE}")
    if not any(name.endswith(SHARD) for name in expected):
        raise ValueError(f"{MANIFEST} lists no {SHARD} file")
    for shard in sorted(checkpoint.glob(f"*{SHARD}")):
        if shard.name not in expected:
            raise ValueError(f"{shard.name} is not in {MANIFEST}")
    return expected


def fault_of(checkpoint: Path, world: World = ALONE) -> str | None:
    """Return the fault of a checkpoint, or None if every file is there and has its hash.

    Each rank reads a share of the files; all come to the same answer.
    """
    mine: list[str | None]
    try:
        files = list(read_manifest(checkpoint).items())[world.rank :: world.size]
        mine = [fault_of_file(checkpoint / name, *entry) for name, entry in files]
    except ValueError as error:
        mine = [str(error)]
    except OSError as error:
        mine = [f"{error.filename}: {error.strerror}"]
    found = (fault for faults in world.gather(mine) for fault in faults)
    return next((fault for fault in found if fault is not None), None)


def newest_good_checkpoint(folder: Path, world: World = ALONE) -> tuple[Path, list[str]]:
    """Return the newest checkpoint without a fault, and a line for each newer one with a fault.

    Raises:
        ValueError: if there is none.
    """
    faults: list[str] = []
    for checkpoint in world.of_first(list_checkpoints(folder)):
        fault = fault_of(checkpoint, world)
        if fault is None:
            return checkpoint, faults
        faults.append(f"{checkpoint}: {fault}")
    found = "; ".join(faults) if faults else "it holds none"
    raise ValueError(f"run.resume: no good checkpoint in {folder}: {found}")
