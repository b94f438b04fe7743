"""What is damaged, missing or foreign in a run's folder is named; nothing of it is trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.real import (
    HEARD,
    Stage,
    assert_nothing_left_behind,
    assert_same_bits,
)
from tests.faults.table import ALONE, DDP, FSDP, Place, fault
from tests.trainers.checkpoint_cases import flip_last_byte
from tests.trainers.test_checkpoint_parts import rewrite, without

Damage = Callable[[Path], None]


def shard(checkpoint: Path) -> Path:
    """Of the last rank."""
    return max(checkpoint.glob("*.safetensors"))


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: dict[str, Damage] = {
    "a byte of a shard flipped": lambda path: flip_last_byte(shard(path)),
    "a shard truncated": lambda path: shorten(shard(path)),
    "a shard deleted": lambda path: shard(path).unlink(),
    "state.json truncated": lambda path: shorten(path / "state.json"),
    "state.json deleted": lambda path: (path / "state.json").unlink(),
    "manifest.json truncated": lambda path: shorten(path / "manifest.json"),
    "manifest.json deleted": lambda path: (path / "manifest.json").unlink(),
    "a strange shard beside": lambda path: shutil.copy(shard(path), path / "z.safetensors") and None,
}
