"""Signs of life between the ranks of a run: one that is gone, or stands still, is named.

A collective that waits for such a rank cannot say which it is, and on some backends waits for ever.
So each rank's thread counts up in the store where the ranks met, and watches the next rank's count.
"""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.world import RANK_FAILED, RankFailed, World

LONGEST_INTERVAL = 1.0  # seconds between two signs of life
ENDED = "ended"  # in place of a count
GO_ON = "the run goes on from its newest checkpoint with --run.resume"


class Heartbeat:
    """This rank's signs of life, and its watch over the others.

    Args:
        world: the ranks.
        silence_seconds: that a rank may show no life.
    """

    def __init__(self, world: World, silence_seconds: float):
        self._world, self._silence = world, silence_seconds
        self._interval = min(LONGEST_INTERVAL, silence_seconds / 5)
        self._place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._prefix = f"fastalign/{restart}"
        self._gone = f"{self._prefix}/gone"  # what a rank found, whose collective failed
        self._store = self._connect()  # of the thread alone
        self._store.set(self._key("who", world.rank), f"{socket.gethostname()}, {os.getpid()}")
        self._store.set(self._key("count", world.rank), "0")
        self._over = threading.Event()
        self._count = 0
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="heartbeat-guard", daemon=True).start()

    def _connect(self) -> TCPStore:
        host, _, port = self._place.rpartition(":")
        return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=30))

    def _key(self, what: str, rank: int) -> str:
        return f"{self._prefix}/{what}/{rank}"

    def _read(self, store: TCPStore, key: str) -> str | None:
        return store.get(key).decode() if store.check([key]) else None

    def _beat(self) -> None:
        """Counts and watches until this rank's run is over, or another rank ends it."""
        following = (self._world.rank + 1) % self._world.size
        key, silent = self._key("count", following), f"{self._prefix}/silent"
        seen, last = None, time.monotonic()
        while not self._over.wait(self._interval):
            self._count += 1
            try:
                self._store.set(self._key("count", self._world.rank), str(self._count))
                now = self._read(self._store, key)
                if now != seen or now == ENDED:
                    seen, last = now, time.monotonic()
                elif time.monotonic() - last > self._silence:
                    self._store.set(silent, str(following))
                told = self._read(self._store, self._gone)
                if told is not None and not self._over.is_set():
                    self._end(told)
                named = self._read(self._store, silent)
                if named is not None and not self._over.is_set():
                    self._end(
                        f"{self._name(self._store, int(named))} has shown no life for "
                        f"{self._silence:g} seconds (--parallel.silence-seconds)"
                    )
            except (dist.DistError, RuntimeError) as error:
                if not self._over.is_set():
                    self._end(f"the store at {self._place}, where the ranks met, is gone: {error}")

    def _guard(self) -> None:
        """Ends this process when the store answers no more, for which the count waits for ever."""
        seen, num_waits = -1, 0
        # Waits are counted: a process that was stopped for a while has done none meanwhile.
        while num_waits * self._interval <= self._silence:
            if self._over.wait(self._interval):
                return
            num_waits = num_waits + 1 if self._count == seen else 0
            seen = self._count
        self._end(
            f"the store at {self._place}, where the ranks met (rank 0 holds it, or torchrun), has "
            f"not answered for {self._silence:g} seconds (--parallel.silence-seconds)"
        )

    def _name(self, store: TCPStore, rank: int) -> str:
        who = self._read(store, self._key("who", rank))
        return f"rank {rank} of {self._world.size} ({who or 'never seen'})"

    def _end(self, text: str) -> None:
        """Ends this process, whose main thread waits where no exception reaches it."""
        print(f"fastalign: rank {self._world.rank}: {text}; {GO_ON}", file=sys.stderr, flush=True)
        if self._world.is_first:  # it holds the store that the others read the same in
            threading.Event().wait(2 * self._interval)
        os._exit(RANK_FAILED)

    def failed(self, text: str) -> None:
        """Says why this rank ends, for the others to read, if the store is still there."""
        self._over.set()  # rank 0, which holds the store, may end first, and of the same error
        self._thread.join(5 * LONGEST_INTERVAL)
        if self._thread.is_alive():  # it waits for a store that does not answer
            return
        with suppress(dist.DistError, RuntimeError):
            self._store.set(self._key("why", self._world.rank), text)
            self._store.set(self._key("count", self._world.rank), ENDED)

    def verdict(self) -> str:
        """Which ranks are gone, after a collective failed: those that ended, or count no more."""
        try:
            store = self._connect()
            found = self._find_gone(store)
            if not found:
                return "no rank is silent"
            self._over.set()
            store.set(self._gone, found)
            if self._world.is_first:  # it holds the store that the others read this in
                threading.Event().wait(3 * self._interval)
            return found
        except (dist.DistError, RuntimeError):
            return f"the store at {self._place}, where the ranks met, is gone"

    def _find_gone(self, store: TCPStore) -> str:
        others = [rank for rank in range(self._world.size) if rank != self._world.rank]
        before = {rank: self._read(store, self._key("count", rank)) for rank in others}
        self._over.wait(5 * self._interval)
        found = []
        for rank in others:
            why = self._read(store, self._key("why", rank))
            now = self._read(store, self._key("count", rank))
            if why is not None:
                found.append(f"{self._name(store, rank)} ended: {why}")
            elif now == before[rank]:
                found.append(f"{self._name(store, rank)} is gone")
        return "; ".join(found)

    def close(self) -> None:
        """Ends the watch when all ranks have come here; whoever holds the store may end then."""
        self._over.set()
        self._thread.join()
        self._store.set(self._key("count", self._world.rank), ENDED)
        self._world.barrier()


@contextmanager
def watched_by_ranks(world: World, config: ParallelConfig) -> Iterator[None]:
    """Shows signs of life, and turns a collective's failure into the name of whoever is gone.

    Raises:
        RankFailed: another rank is gone.
    """
    if world.size == 1 or not config.silence_seconds:
        yield
        return
    heartbeat = Heartbeat(world, config.silence_seconds)
    try:
        yield
    except BaseException as error:
        if not is_of_ranks(error):
            heartbeat.failed(" ".join(str(error).split()) or type(error).__name__)
            raise
        leave_in_peace()
        text = f"rank {world.rank}: {heartbeat.verdict()}; {GO_ON} ({told_shortly(error)})"
        raise RankFailed(text) from error
    heartbeat.close()


def told_shortly(error: BaseException) -> str:
    """A collective's error without the places in source files and the advice in it."""
    found = re.search(r"\] *([^\[\]]*?(?:by peer|timed? ?out[^.]*))", str(error), re.IGNORECASE)
    return (
        found.group(1).lstrip(":0123456789 ") if found else str(error).strip().splitlines()[0][:120]
    )


def leave_in_peace() -> None:
    """Lets this process say what it found, though `torchrun` asks all ranks to end meanwhile."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def is_of_ranks(error: BaseException) -> bool:
    """Whether a collective failed; gloo's errors are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
