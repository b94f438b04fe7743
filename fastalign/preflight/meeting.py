"""The ranks of a run around one store: each says what it found, rank 0 judges, all hear of it.

Nothing here waits without an end, and who did not come is named; a process group can do neither.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

from fastalign.ranks.world import World

Facts = dict[str, Any]


Judge = Callable[[list[Facts]], list[str]]


class Deadline:
    """So many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the time is over; never less than a tenth of one."""
        return max(0.1, self._end - (1 - share) * self.seconds - time.monotonic())


ARRIVAL_SHARE = 0.5  # of the time: the rest is for checks, and for the verdict's way to all
FAREWELL_SECONDS = 5.0
BETWEEN_TRIES_SECONDS = 0.1


class Disagreement(ValueError):
    """A verdict that all ranks heard: one process of a machine is enough to print it."""


def master_of_environment() -> tuple[str, int]:
    """Where rank 0 is met.

    Raises:
        ValueError: a variable is missing, is no port, or is a name that nobody knows here.
    """
    host, text = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host:
        raise ValueError("MASTER_ADDR: expected the name or address of rank 0's machine, got none")
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise ValueError(f"MASTER_PORT: expected a port from 1 to 65535, got {text!r}")
    try:
        socket.getaddrinfo(host, int(text))
    except OSError as error:
        raise ValueError(f"MASTER_ADDR: {host} has no address here ({error.strerror})") from None
    return host, int(text)


def check_free(port: int) -> None:
    """Whether rank 0 can listen.

    Raises:
        ValueError: something else does.
    """
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"MASTER_PORT: rank 0 on {socket.gethostname()} cannot listen at {port} "
                f"({error.strerror}); expected a free port"
            ) from None


def wait_for_listener(host: str, port: int, deadline: Deadline) -> None:
    """Returns when something listens there.

    Raises:
        OSError: nothing does in time.
    """
    while True:
        try:
            socket.create_connection((host, port), timeout=deadline.left()).close()
            return
        except OSError:
            if deadline.left() <= BETWEEN_TRIES_SECONDS:
                raise
        time.sleep(BETWEEN_TRIES_SECONDS)


def open_store(world: World, deadline: Deadline) -> Store:
    """The store that all ranks share: torchrun's own, or one that rank 0 opens.

    Raises:
        ValueError: the port is taken, or rank 0 cannot be reached.
        Stuck: what listens there is no store.
    """
    host, port = master_of_environment()
    serves = world.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if serves:
        check_free(port)
    here = f"rank {world.rank} of {world.size} on {socket.gethostname()}"
    try:
        if not serves:
            wait_for_listener(host, port, deadline)
        timeout = timedelta(seconds=deadline.left())
        store = within(
            deadline.left(),
            f"{here}: what listens at {host}:{port} (MASTER_ADDR, MASTER_PORT) is no rank 0",
            lambda: TCPStore(host, port, None, serves, timeout, wait_for_workers=False),
        )
    except (OSError, dist.DistError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{here} does not reach rank 0 at {host}:{port} (MASTER_ADDR, MASTER_PORT) in "
            f"{deadline.seconds:g} seconds: {reason}"
        ) from None
    return PrefixStore(f"preflight/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def named(ranks: Sequence[int], hosts: dict[int, str]) -> str:
    """`ranks 0, 1 on a; rank 2 on b; rank 3`: by machine, where it is known."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts.get(rank, ""), []).append(rank)
    return "; ".join(
        f"rank{'s' if len(found) > 1 else ''} {', '.join(str(rank) for rank in found)}"
        + (f" on {host}" if host else "")
        for host, found in by_host.items()
    )


class Meeting:
    """The ranks, and what they say; used once.

    Args:
        world: of this process.
        deadline: by which all is over.

    Attributes:
        hosts: of the ranks that came (known to rank 0).
    """

    def __init__(self, world: World, deadline: Deadline) -> None:
        self._world, self._deadline = world, deadline
        self.hosts: dict[int, str] = {}
        self.store = open_store(world, deadline) if world.size > 1 else HashStore()

    def agree(self, name: str, mine: Facts, judge: Judge, *, share: float = 1.0) -> list[Facts]:
        """Gives rank 0 what this one found, and returns when its verdict is that all is well.

        Args:
            name: of the round.
            mine: what JSON can hold; the first round's has the `host`.
            judge: called on rank 0 with the ranks' facts in order; returns faults.
            share: of the time, by which the ranks must have spoken.

        Returns:
            On rank 0 everybody's facts; on the others nothing.

        Raises:
            Disagreement: what is at fault, on every rank.
            ValueError: rank 0 said nothing in time.
        """
        self.store.set(f"{name}/{self._world.rank}", json.dumps(mine))
        facts: list[Facts] = []
        if self._world.is_first:
            facts, faults = self._heard(name, share)
            faults = faults or judge(facts)
            self.store.set(f"{name}/verdict", json.dumps(faults))
        try:
            self.store.wait([f"{name}/verdict"], timedelta(seconds=self._deadline.left()))
            faults = json.loads(self.store.get(f"{name}/verdict"))
        except dist.DistError:
            raise ValueError(
                f"rank {self._world.rank} of {self._world.size} on {socket.gethostname()}: rank 0 "
                f"gave no verdict in {self._deadline.seconds:g} seconds"
            ) from None
        if faults:
            raise Disagreement("; ".join(faults))
        return facts

    def _heard(self, name: str, share: float) -> tuple[list[Facts], list[str]]:
        """What each rank said, and who said nothing."""
        keys = [f"{name}/{rank}" for rank in range(self._world.size)]
        seconds = self._deadline.left(share)
        with suppress(dist.DistStoreError):
            self.store.wait(keys, timedelta(seconds=seconds))
        facts = {
            rank: json.loads(self.store.get(key))
            for rank, key in enumerate(keys)
            if self.store.check([key])
        }
        self.hosts = self.hosts or {rank: str(found["host"]) for rank, found in facts.items()}
        silent = [rank for rank in range(self._world.size) if rank not in facts]
        if not silent:
            return list(facts.values()), []
        fault = (
            f"{named(silent, self.hosts)} of {self._world.size} did not "
            f"{'report back' if self.hosts.keys() & set(silent) else 'come'} in {seconds:.0f} "
            f"seconds; here: {named(list(facts), self.hosts)}"
        )
        return list(facts.values()), [fault]

    def close(self) -> None:
        """Returns when all that came have heard the last verdict, or have had the time to."""
        timeout = timedelta(seconds=FAREWELL_SECONDS)
        try:
            self.store.set(f"farewell/{self._world.rank}", "")
            if self._world.is_first:
                self.store.wait([f"farewell/{rank}" for rank in self.hosts], timeout)
                self.store.set("end", "")
            else:
                self.store.wait(["end"], timeout)
        except dist.DistError:  # whoever is gone has no need of it
            pass


T = TypeVar("T")
CALL = "call with a deadline"


class Stuck(ValueError):
    """A call that did not return; its thread is still in it."""


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
