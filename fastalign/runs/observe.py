"""Beside a run's steps: signals that stop it, a trace of one step, the stacks of a stalled one."""

import faulthandler
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastalign.ranks.failure import is_of_ranks
from fastalign.ranks.world import ALONE, World

TRACES = "profile"
STALLS = "stalls.txt"
PATIENCE_SECONDS = 30.0  # that the writing thread may be late
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}


@dataclass
class StopRequest:
    """Set by a signal.

    Attributes:
        received: the signal, or None.
        agreed: signal that all ranks stop for at one step, or None.
    """

    received: signal.Signals | None = None
    agreed: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """0 after SIGTERM (a scheduler's orderly stop), 130 after SIGINT (the shell's custom)."""
        return 0 if self.agreed is None else EXIT_CODES[self.agreed]


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Record the first signal; a second one has its ordinary effect at once.

    Behind a collective that failed SIGTERM is ignored: this rank has yet to say who is gone, and
    `torchrun` asks all to end as soon as it sees one gone. Outside the main thread Python cannot
    handle signals, and none are asked for.
    """
    request = StopRequest()
    previous: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        request.received = signal.Signals(number)
        for known, handler in previous.items():
            signal.signal(known, handler)

    try:
        for number in EXIT_CODES:
            previous[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread
        yield request
        return
    try:
        yield request
    except BaseException as error:
        if is_of_ranks(error):
            previous[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for known, handler in previous.items():
            signal.signal(known, handler)


@contextmanager
def traced(folder: Path, *, wanted: bool, step: int, world: World = ALONE) -> Iterator[None]:
    """Write a trace of the step's operations for Chrome and Perfetto, if it is wanted.

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

    A thread writes them; where it cannot, since the step holds the interpreter's lock, the
    interpreter does so without. That reads frames while they may change, so it is the last resort.

    A limit of 0 `seconds` disables the watch. Every rank has a file of its own.
    """

    def __init__(self, folder: Path, seconds: float, world: World = ALONE):
        self._seconds = seconds
        self._path = folder / (STALLS if world.is_first else f"stalls-rank{world.rank:05d}.txt")
        self._file = self._path.open("ab") if seconds else None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Watch one step; print afterwards where its stacks are, if it stalled."""
        if self._file is None:
            yield
            return
        size = self._path.stat().st_size
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,), name="stall-watch", daemon=True)
        self._rearm()
        watch.start()
        try:
            yield
        finally:
            over.set()
            watch.join()
            faulthandler.cancel_dump_traceback_later()
            if self._path.stat().st_size > size:
                print(
                    f"step {number} took more than {self._seconds:g} seconds; the stacks of all "
                    f"threads are in {self._path}",
                    flush=True,
                )

    def _rearm(self) -> None:
        assert self._file is not None
        later = self._seconds + PATIENCE_SECONDS
        faulthandler.dump_traceback_later(later, repeat=True, file=self._file)

    def _watch(self, over: threading.Event) -> None:
        """Write the stacks each time that the step has taken as long again."""
        assert self._file is not None
        while not over.wait(self._seconds):
            self._rearm()
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for number, frame in sys._current_frames().items():
                if number == threading.get_ident():
                    continue
                head = f"Thread {names.get(number, number)} (most recent call last):\n"
                self._file.write((head + "".join(traceback.format_stack(frame))).encode())
            self._file.flush()

    def close(self) -> None:
        """Close the file, and remove it if it is empty."""
        if self._file is not None:
            self._file.close()
            if not self._path.stat().st_size:
                self._path.unlink()
