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
from fastalign.ranks.world import RankFailed, World, first_line

NUM_BYTES = 1024  # of the message that ranks exchange
LEAVING_SECONDS = 10.0  # for which a rank that ends by its own error waits to tell the others why
GO_ON = "the run goes on from its newest checkpoint with --run.resume"


class Peers:
    """The other ranks, as seen after a failure.

    Every rank must make it, and use it once.
    """

    def __init__(self, world: World) -> None:
        self._size = world.size
        self._others = [rank for rank in range(world.size) if rank != world.rank]
        self._names = world.gather(f"{socket.gethostname()}, {os.getpid()}")
        self._group = dist.new_group(backend="gloo")

    def missing(self, reason: str, seconds: float) -> str:
        """Exchange messages with the other ranks; return one that names those that are missing.

        `reason` is the error that this rank ends with itself; "" if a collective of it failed. The
        others have `seconds` to answer.
        """
        self._fail_others()
        mine = torch.frombuffer(
            bytearray(reason.encode()[:NUM_BYTES].ljust(NUM_BYTES, b"\0")), dtype=torch.uint8
        )
        gone, silent, messages, works = {}, {}, {}, {}
        for rank in self._others:
            messages[rank] = torch.zeros_like(mine)
            try:
                works[rank] = (
                    dist.irecv(messages[rank], rank, self._group),
                    dist.isend(mine, rank, self._group),
                )
            except RuntimeError:
                gone[rank] = "is gone"
        end = time.monotonic() + seconds
        for rank, pair in works.items():
            try:
                for work in pair:
                    assert work is not None
                    work.wait(timedelta(seconds=max(0.1, end - time.monotonic())))
            except RuntimeError:
                if time.monotonic() < end - 0.05:  # gloo waits for whole milliseconds
                    gone[rank] = "is gone"
                else:
                    silent[rank] = (
                        f"has not answered for {seconds:g} seconds (--parallel.silence-seconds)"
                    )
                continue
            told = bytes(messages[rank].tolist()).rstrip(b"\0").decode(errors="replace")
            if told:
                gone[rank] = f"ended: {told}"
        # Beside a rank that is gone, those that are silent may compute still.
        found = sorted((gone or silent).items())
        names = [f"rank {r} of {self._size} ({self._names[r]}) {what}" for r, what in found]
        return "; ".join(names) or "every rank answers"

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
def watched_by_ranks(world: World, config: ParallelConfig) -> Iterator[None]:
    """Turn the failure of a collective into an error that names the missing ranks.

    Raises:
        RankFailed: if another rank is missing.
    """
    if world.size == 1:
        yield
        return
    peers = Peers(world)
    try:
        yield
        world.barrier()  # a rank that ends before it is not missing yet
    except Exception as error:
        if not is_of_ranks(error):
            reason = " ".join(str(error).split()) or type(error).__name__
            peers.missing(reason, min(LEAVING_SECONDS, config.silence_seconds))
            raise
        ignore_sigterm()
        text = f"rank {world.rank}: {peers.missing('', config.silence_seconds)}; {GO_ON}"
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
