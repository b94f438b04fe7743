"""Checkpoints: written aside, synced, hashed, renamed; a damaged one is named and passed over.

A checkpoint is a folder `step-000100` with `model.safetensors` (of a frozen base with an adapter:
the adapter alone), `optimizer.pt`, `state.json`, where the reference is renewed as the run goes
`reference.safetensors`, and `manifest.json` (size and SHA-256 of the others). Nothing in it
executes code when it is loaded.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from fastalign.trainers.state import TrainState, random_state, restore_random_state

CHECKPOINTS = "checkpoints"  # in a run's folder
MANIFEST = "manifest.json"
REFERENCE = "reference.safetensors"
ROLLOUTS = "rollouts.json"
FORMAT = 1


def sha256_of(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Returns when the file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader finds the old content or the new, never half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(content)
        sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)  # there only if the disk is full or the like
    sync(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """The same for text, as UTF-8."""
    write_bytes_atomically(path, text.encode())


def trainable_parameters(model: Any) -> dict[str, Tensor]:
    """What a run changes, by name; without a frozen base it is every parameter."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def is_all_of(model: Any, trainable: dict[str, Tensor]) -> bool:
    """Whether nothing of the model is frozen."""
    return len(trainable) == sum(1 for _ in model.parameters())


def save_checkpoint(folder: Path, state: TrainState, extra: dict[str, Any], keep: int) -> Path:
    """Writes `folder/step-NNNNNN` and removes all but the newest `keep`.

    Args:
        folder: the run's `checkpoints/`.
        state: what to save.
        extra: more for `state.json` (JSON).
        keep: checkpoints to keep.

    Raises:
        AssertionError: a weight is not finite; no checkpoint ever holds one.
    """
    trainable = trainable_parameters(state.model)
    for name, parameter in trainable.items():
        assert bool(torch.isfinite(parameter).all()), f"{name} holds a non-finite weight"
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".writing-step-{state.step:06d}"
    for half in folder.glob(".writing-step-*"):  # left behind by a run that was killed
        shutil.rmtree(half)
    aside.mkdir()
    if is_all_of(state.model, trainable):
        save_model(state.model, str(aside / "model.safetensors"))
    else:
        save_file(trainable, aside / "model.safetensors")
    if state.reference:
        save_file(state.reference, aside / REFERENCE)
    if state.rollouts:
        (aside / ROLLOUTS).write_text(json.dumps(state.rollouts), encoding="utf-8")
    torch.save(
        {"optimizer": state.optimizer.state_dict(), "random": random_state()},
        aside / "optimizer.pt",
    )
    text = json.dumps({"format": FORMAT, **state.counters(), **extra}, indent=1)
    (aside / "state.json").write_text(text, encoding="utf-8")
    manifest = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(aside.iterdir())
    }
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in aside.iterdir():
        sync(path)
    sync(aside)
    final = folder / f"step-{state.step:06d}"
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    sync(folder)
    for old in list_checkpoints(folder)[keep:]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, whether good or not."""
    return sorted(folder.glob("step-[0-9]*"), key=lambda path: int(path.name[5:]), reverse=True)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file is there and has its hash."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for required in ("model.safetensors", "optimizer.pt", "state.json"):
        if required not in expected:
            return f"{MANIFEST} does not list {required}"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
        if sha256_of(path) != digest:
            return f"{name} is damaged (its SHA-256 differs)"
    return None


def newest_good_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint without a fault, and a line for each newer one that has one.

    Raises:
        ValueError: there is none.
    """
    faults: list[str] = []
    for checkpoint in list_checkpoints(folder):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(f"{checkpoint}: {fault}")
    found = "; ".join(faults) if faults else "it holds none"
    raise ValueError(f"run.resume: no good checkpoint in {folder}: {found}")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint that has no fault."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{checkpoint}: expected checkpoint format {FORMAT}, got {state.get('format')!r}"
        )
    return state


def restore(checkpoint: Path, state: TrainState) -> dict[str, Any]:
    """Loads a checkpoint without a fault into `state`; returns its `state.json`."""
    saved = read_state(checkpoint)
    trainable = trainable_parameters(state.model)
    if is_all_of(state.model, trainable):
        load_model(state.model, checkpoint / "model.safetensors", strict=True)
    else:
        weights = load_file(checkpoint / "model.safetensors")
        assert weights.keys() == trainable.keys(), "a resumed run has the same settings"
        for name, value in trainable.items():
            value.copy_(weights[name])
    device = next(state.model.parameters()).device
    if (checkpoint / REFERENCE).exists():
        state.reference = load_file(checkpoint / REFERENCE, device=str(device))
    if (checkpoint / ROLLOUTS).exists():
        state.rollouts = json.loads((checkpoint / ROLLOUTS).read_text(encoding="utf-8"))
    content = torch.load(checkpoint / "optimizer.pt", map_location=device, weights_only=True)
    state.optimizer.load_state_dict(content["optimizer"])
    restore_random_state({name: value.cpu() for name, value in content["random"].items()})
    for name, initial in state.counters().items():  # older checkpoints know fewer of them
        setattr(state, name, saved.get(name, initial))
    return saved
