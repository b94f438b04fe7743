"""Work that has to end in time, whatever hangs in it."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
CALL = "call with a deadline"


class Stuck(ValueError):
    """A call that did not return; its thread is still in it."""


class Deadline:
    """So many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the time is over; never less than a tenth of one."""
        return max(0.1, self._end - (1 - share) * self.seconds - time.monotonic())


def within(seconds: float, what: str, work: Callable[[], T]) -> T:
    """What `work` returns or raises, if it does so in time.

    Raises:
        Stuck: it did not; native code cannot be interrupted, so its thread stays.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:  # raised again below, in the caller's thread
            failed.append(error)

    thread = threading.Thread(target=run, name=CALL, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise Stuck(f"{what}: no end in {seconds:.0f} seconds")
    return done[0]


def is_stuck() -> bool:
    """Whether a call of `within` never returned: an ordinary exit might wait for it."""
    return any(thread.name == CALL for thread in threading.enumerate())
