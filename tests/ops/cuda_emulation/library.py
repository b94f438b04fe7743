"""Runs `backend="native"` of CPU tensors on the emulated CUDA kernels."""

import ctypes
import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastalign.ops import native_library
from fastalign.ops.native_library import EntryPoint

# The orders in which the threads of a block, its warps, and the blocks have their turn.
ORDERS = ("forward", "reverse")


class EmulatedLibrary:
    """A library of `build.py`, and how often each of its functions was called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: Counter[str] = Counter()
        self.loaded = ctypes.CDLL(str(path))
        self._other_entry_point = native_library.entry_point

    def entry_point(self, name: str, device: torch.device) -> EntryPoint:
        """Return the emulated function; the CPU's own where CUDA has none."""
        function = getattr(self.loaded, f"fastalign_{name}_cuda", None)
        if function is None:
            return self._other_entry_point(name, device)
        self.calls[name] += 1
        return EntryPoint(function, self.loaded, [ctypes.c_void_p(None)])

    @property
    def cluster_size(self) -> int:
        """Blocks in each cluster of the last launch."""
        return int(self.loaded.fastalign_emulated_cluster())

    @contextmanager
    def used(self, order: str) -> Iterator[None]:
        """Make native code of CPU tensors run here, in one of ORDERS or by a seed."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FASTALIGN_EMULATION_ORDER", order)
            patch.setattr(native_library, "entry_point", self.entry_point)
            yield


def cases_of(module: ModuleType) -> type:
    """Return a test class of a test module's functions that have a backend.

    Its `backend` is the fixture of the module that holds the class.
    """
    tests = {
        name: staticmethod(function)
        for name, function in vars(module).items()
        if name.startswith("test_") and "backend" in inspect.signature(function).parameters
    }
    assert tests, module
    return type(module.__name__, (), tests)
