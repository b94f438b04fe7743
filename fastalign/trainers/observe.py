"""What a run shows of itself while it goes: a trace of one step, the stacks of a stalled one."""

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastalign.world import ALONE, World

TRACES = "profile"
STALLS = "stalls.txt"


@contextmanager
def traced(folder: Path, *, wanted: bool, step: int, world: World = ALONE) -> Iterator[None]:
    """Writes what the step's operations took, as Chrome and Perfetto read it, if it is wanted.

    Every rank writes a file of its own.
    """
    if not wanted:
        yield
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as found:
        yield
    rank = "" if world.is_first else f"-rank{world.rank:05d}"
    path = folder / TRACES / f"step-{step:06d}{rank}.json"
    path.parent.mkdir(exist_ok=True)
    found.export_chrome_trace(str(path))
    print(f"trace of step {step} written to {path}", flush=True)


class StallWatch:
    """Writes every thread's stack into the run's folder when a step takes too long.

    The interpreter writes them from a thread of its own, so that a step which hangs in native
    code, or holds the interpreter's lock, is shown as well.

    Args:
        folder: of the run.
        seconds: that a step may take; 0: any.
        world: the ranks, each with a file of its own.
    """

    def __init__(self, folder: Path, seconds: float, world: World = ALONE):
        self._seconds = seconds
        self._path = folder / (STALLS if world.is_first else f"stalls-rank{world.rank:05d}.txt")
        self._file = self._path.open("ab") if seconds else None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Watches over one step; says afterwards where its stacks are, if it stalled."""
        if self._file is None:
            yield
            return
        size = self._path.stat().st_size
        faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            if self._path.stat().st_size > size:
                print(
                    f"step {number} took more than {self._seconds:g} seconds; the stacks of all "
                    f"threads are in {self._path}",
                    flush=True,
                )

    def close(self) -> None:
        """Leaves no empty file behind."""
        if self._file is not None:
            self._file.close()
            if not self._path.stat().st_size:
                self._path.unlink()
