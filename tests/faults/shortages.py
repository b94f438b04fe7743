"""What a process runs out of: memory, room on its disk."""

import errno
import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


def out_of_memory() -> None:
    """As PyTorch's allocator says it."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def disk_error() -> None:
    """As a disk or a network file system says it."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@dataclass(frozen=True)
class NoConsole:
    """Neither stdout nor stderr can be written: a pipe whose reader is gone, or a full disk."""

    what: Literal["a closed pipe", "a full disk"]

    def __call__(self) -> None:
        if self.what == "a full disk":
            target = os.open("/dev/full", os.O_WRONLY)
        else:
            reader, target = os.pipe()
            os.close(reader)
        for number in (1, 2):
            os.dup2(target, number)


@dataclass(frozen=True)
class SmallFiles:
    """No file of this process may be larger, as on a full disk."""

    num_bytes: int

    def __call__(self) -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, hard))


@dataclass(frozen=True)
class Filled:
    """All that is left of a disk is taken by a file."""

    file: Path

    def __call__(self) -> None:
        with suppress(OSError), self.file.open("wb", buffering=0) as file:
            for size in (2**20, 1):
                with suppress(OSError):
                    while file.write(b"0" * size):
                        pass
