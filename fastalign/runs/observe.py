"""Beside a run's steps: signals that stop it, a trace of one step, the stacks of a stalled one."""

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
# Exit codes of the stopped run: 0 after a scheduler's orderly stop, otherwise the shell's custom.
EXIT_CODES = {
    signal.SIGTERM: 0,
    signal.SIGUSR1: 0,
    signal.SIGXCPU: 0,
    signal.SIGHUP: 129,
    signal.SIGINT: 130,
}
# A request may come more than once: torchrun forwards to its workers what they got already, and a
# terminal that is closed sends SIGHUP to the group, whose shell sends it again.
ONE_REQUEST_SECONDS = 2.0
HEARD = b"\nstopping after this step and saving; again: stop now\n"


@dataclass
class StopRequest:
    """Set by a signal.

    Attributes:
        received: the signal, or None.
        agreed: signal that all ranks stop for at one step, or None.
        insisted: whether a second request asked to stop at once, without a save.
    """

    received: signal.Signals | None = None
    agreed: signal.Signals | None = None
    insisted: bool = False

    @property
    def exit_code(self) -> int:
        """The exit code of the signal that the run stopped for, or 0."""
        return 0 if self.agreed is None else EXIT_CODES[self.agreed]


@contextmanager
def stop_on_signal(*, speaks: bool = True) -> Iterator[StopRequest]:
    """Record the first request; a second one has the signal's ordinary effect at once.

    Signals within `ONE_REQUEST_SECONDS` are one request, and so is every SIGXCPU, which the kernel
    sends each second. SIGHUP stays ignored where it is (`nohup`). Behind a collective that failed
    SIGTERM is ignored: this rank has yet to say who is gone, and `torchrun` asks all to end as soon
    as it sees one gone. Outside the main thread Python cannot handle signals, and none are asked
    for. With `speaks` the first request is acknowledged on the terminal.
    """
    request = StopRequest()
    previous: dict[signal.Signals, Any] = {}
    first = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if request.received is None:
            request.received, first = signal.Signals(number), time.monotonic()
            if speaks:
                acknowledge()
            return
        if number == signal.SIGXCPU or time.monotonic() < first + ONE_REQUEST_SECONDS:
            return
        request.insisted = True
        for known, handler in previous.items():
            signal.signal(known, handler)
        signal.raise_signal(number)

    try:
        for number in EXIT_CODES:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
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


def acknowledge() -> None:
    """Say that the request was heard; a handler may interrupt `print`, so it writes by itself."""
    with suppress(OSError, ValueError):  # no terminal, or one that is gone
        os.write(sys.stderr.fileno(), HEARD)


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
    try:
        path.parent.mkdir(exist_ok=True)
        found.export_chrome_trace(str(path))
    except OSError as error:  # the step's updates are done: it must not be lost
        print(f"trace of step {step} was not written to {path}: {error.strerror}")
        return
    print(f"trace of step {step} written to {path}")


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
        size = self._size()
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
            if not self._file.closed and self._size() > size:  # a dropped step ends late
                print(
                    f"step {number} took more than {self._seconds:g} seconds; the stacks of all "
                    f"threads are in {self._path}"
                )

    def _size(self) -> int:
        assert self._file is not None
        return os.fstat(self._file.fileno()).st_size  # its name may be gone

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
            size = self._size()
            self._file.close()
            if not size:
                self._path.unlink(missing_ok=True)
