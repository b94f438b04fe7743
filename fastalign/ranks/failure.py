"""Failed collectives: find and name the ranks that are missing, and end with a code of its own.

A collective fails when a rank's connections close, or when a rank does not come within the process
group's time limit. Its error names no rank. So the ranks whose collective failed exchange a message
over a gloo group of its own: one that cannot be reached is gone, one that does not answer hangs.

`monitored_barrier` does this only in part: it names ranks that do not answer, on rank 0 alone, but
where a connection is closed it raises the connection's error (torch 2.13).
"""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.errors import RankFailed
from fastalign.ranks.world import World, first_line

NUM_BYTES = 1024  # of the message that ranks exchange
LEAVING_SECONDS = 10.0  # for which a rank that ends by its own error waits to tell the others why
NO_ANSWER = "has not answered"
GO_ON = "the run goes on from its newest checkpoint with --run.resume"


class Peers:
    """The other ranks, as seen after a failure.

    Every rank must make it. When its run fails each rank exchanges one message with the others.
    """

    def __init__(self, world: World, config: ParallelConfig) -> None:
        self._size, self._config = world.size, config
        self._others = [rank for rank in range(world.size) if rank != world.rank]
        self._names = world.gather(f"{socket.gethostname()}, {os.getpid()}")
        self._group = dist.new_group(backend="gloo")
        self._messages: dict[int, str] | None = None
        self._missing: dict[int, str] = {}

    def all_hold(self, step: int, error: BaseException) -> bool:
        """Return whether every rank fails now, and holds the whole state of this step.

        `step` is the number of that step, -1 if this rank holds none; `error` is what it ends with.
        """
        messages = self._exchange(step, error)
        return step >= 0 and [m.split(" ")[0] for m in messages.values()] == [str(step)] * len(
            self._others
        )

    def missing(self, error: BaseException) -> str:
        """Return a message that names the missing ranks, where this rank ends with `error`."""
        for rank, message in self._exchange(-1, error).items():
            reason = message.partition(" ")[2]
            if reason:
                self._missing[rank] = f"ended: {reason}"
        # Beside a rank that is gone, those that are silent may compute still.
        silent = [rank for rank, what in self._missing.items() if what.startswith(NO_ANSWER)]
        gone = [rank for rank in sorted(self._missing) if rank not in silent]
        names = [
            f"rank {r} of {self._size} ({self._names[r]}) {self._missing[r]}"
            for r in gone or sorted(silent)
        ]
        return "; ".join(names) or "every rank answers"

    def _exchange(self, step: int, error: BaseException) -> dict[int, str]:
        """Exchange messages with the other ranks, once; return those that came.

        A message is the step, and the error that this rank ends by itself with; a rank of which a
        collective failed has none.
        """
        if self._messages is not None:
            return self._messages
        self._messages = {}
        reason, seconds = "", self._config.silence_seconds
        if is_of_ranks(error):
            ignore_sigterm()
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
            seconds = min(LEAVING_SECONDS, seconds)
        self._fail_others()
        text = f"{step} {reason}".encode()[:NUM_BYTES].ljust(NUM_BYTES, b"\0")
        mine = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        found, works = {}, {}
        for rank in self._others:
            found[rank] = torch.zeros_like(mine)
            try:
                works[rank] = (
                    dist.irecv(found[rank], rank, self._group),
                    dist.isend(mine, rank, self._group),
                )
            except RuntimeError:
                self._missing[rank] = "is gone"
        end = time.monotonic() + seconds
        for rank, pair in works.items():
            try:
                for work in pair:
                    assert work is not None
                    work.wait(timedelta(seconds=max(0.1, end - time.monotonic())))
            except RuntimeError:
                if time.monotonic() < end - 0.05:  # gloo waits for whole milliseconds
                    self._missing[rank] = "is gone"
                else:
                    self._missing[rank] = (
                        f"{NO_ANSWER} for {seconds:g} seconds (--parallel.silence-seconds)"
                    )
                continue
            message = bytes(found[rank].tolist()).rstrip(b"\0").decode(errors="replace")
            self._messages[rank] = message
        return self._messages

    def _fail_others(self) -> None:
        """Close this rank's connections in the default group.

        Ranks that wait in a collective fail then at once, and not after their own time limit: gloo
        closes all connections of a group where a receive has timed out.
        """
        for rank in self._others:
            with suppress(RuntimeError):
                work = dist.irecv(torch.empty(1), rank, tag=1)
                assert work is not None
                work.wait(timedelta(milliseconds=1))


@contextmanager
def watched_by_ranks(world: World, config: ParallelConfig) -> Iterator[Peers | None]:
    """Turn the failure of a collective into an error that names the missing ranks.

    Yields:
        The other ranks, if there are any.

    Raises:
        RankFailed: if another rank is missing.
    """
    if world.size == 1:
        yield None
        return
    peers = Peers(world, config)
    try:
        yield peers
        world.barrier()  # a rank that ends before it is not missing yet
    except Exception as error:
        missing = peers.missing(error)
        if not is_of_ranks(error):
            raise
        text = f"rank {world.rank}: {missing}; {GO_ON}"
        raise RankFailed(f"{text} ({short_reason(error)})") from error


def short_reason(error: BaseException) -> str:
    """Return a collective's error without its places in source files and its advice."""
    found = re.search(r"\] *([^\[\]]*?(?:by peer|timed? ?out[^.]*))", str(error), re.IGNORECASE)
    return found.group(1).lstrip(":0123456789 ") if found else first_line(error)[:120]


def ignore_sigterm() -> None:
    """Ignore SIGTERM, by which `torchrun` ends all ranks once one is gone: this one has to print.

    torchrun sends SIGKILL after 30 seconds.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def is_of_ranks(error: BaseException) -> bool:
    """Return True for a failed collective's error; gloo's are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def record_collectives(folder: Path) -> None:
    """Have NCCL's flight recorder write each rank's last collectives when one times out.

    Its files, `flight-recorder.rank0` and so on, are read by `torchfrtrace`. Variables that are set
    already are left as they are.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{folder.absolute()}/flight-recorder.rank")
