"""SIGTERM and SIGINT ask the loop to stop after the current step, so that it can save first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from fastalign.ranks.failure import is_of_ranks

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
