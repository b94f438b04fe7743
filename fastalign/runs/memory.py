"""Memory of this process, and notes on what was being done when it did not suffice."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastalign.models import is_out_of_memory

# How the notes on an optimiser step, and on a model that is read, begin.
STEP = "step "
LOADING = "loading "


def resident_bytes() -> int:
    """Return this process's resident memory on Linux, 0 elsewhere."""
    table = Path("/proc/self/statm")
    if not table.exists():
        return 0
    return int(table.read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: PyTorch's on a GPU, otherwise the process's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def memory_used_in(what: str) -> Iterator[None]:
    """Add a note of what was being done to an error of memory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            error.add_note(what)
        raise
