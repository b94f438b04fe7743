"""The processes of one run, as `torchrun` starts them: their numbers, and their process group.

A run of one process needs no process group; every method of `World` is then the identity.
"""

import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

from fastalign.ranks.errors import RanksDiffer

T = TypeVar("T")
FAREWELL_SECONDS = 5.0
_runs = itertools.count()  # of this process, of which every rank has as many


@dataclass(frozen=True)
class World:
    """This process among those of its run.

    Only `size` decides whether there are others: a library may have opened a process group of its
    own in a run of one process.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes of the run.
        local_rank: number of this process on its machine, from 0; also the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """True on rank 0, which prints and writes for all."""
        return self.rank == 0

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Return every rank's value, in the ranks' order, on every rank.

        Args:
            value: of this rank; it is pickled.
            group: the process group of all ranks to use; None: the default one.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group)
        return found

    def of_first(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found)
        return found[0]

    def first_does(
        self, work: Callable[[], T], errors: tuple[type[Exception], ...] = (ValueError, OSError)
    ) -> T:
        """Run `work` on rank 0 alone; return its result, or raise its error, on every rank.

        `errors` are the types of errors that are raised on every rank; others end rank 0 only.
        """
        if self.size == 1:
            return work()
        outcome: tuple[int | None, Any] = (None, None)
        raised: Exception | None = None
        if self.is_first:
            try:
                outcome = (None, work())
            except errors as error:
                raised = error
                kind = next(place for place, cls in enumerate(errors) if isinstance(error, cls))
                outcome = (kind, str(error))
        number, value = self.of_first(outcome)
        if raised is not None:
            raise raised
        if number is not None:
            raise errors[number](value)
        return value  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Return when every rank has called this."""
        self.gather(None)

    def part_of(self, count: int) -> range:
        """Return this rank's share of `count` items in order; shares differ by one at most."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)


ALONE = World()


def world_of_environment() -> World:
    """Return this process's place as `torchrun` sets it in the environment, or a run of one.

    Raises:
        ValueError: if a variable is missing, or is no number in its range.
    """
    if "WORLD_SIZE" not in os.environ:
        return ALONE
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ.get(name, "")
        if not text.isdecimal():
            raise ValueError(f"{name}: expected a number from torchrun, got {text!r}")
        numbers[name] = int(text)
    world = World(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"])
    if not world.rank < world.size:
        raise ValueError(f"RANK: expected less than WORLD_SIZE {world.size}, got {world.rank}")
    return world


@contextmanager
def open_world(world: World, *, timeout_seconds: float, always: bool = False) -> Iterator[None]:
    """Join the ranks in a process group: gloo for host memory, NCCL for GPUs.

    `timeout_seconds` limits the start, and every collective; with `always` a run of one process has
    a group too.

    Raises:
        RanksDiffer: if ranks are missing, or were started with another WORLD_SIZE.
        ValueError: if rank 0 is not reached, or no process group can be made.
    """
    if world.size == 1 and not always:
        yield
        return
    store = HashStore() if world.size == 1 else meet(world, timeout_seconds)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            store=PrefixStore("group", store),
            rank=world.rank,
            world_size=world.size,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{here(world)} has no process group (GLOO_SOCKET_IFNAME): {first_line(error)}"
        ) from error
    try:
        yield
    except BaseException:
        if world.size == 1:
            dist.destroy_process_group()
        raise  # with other ranks the process ends: an orderly exit would wait for them
    dist.destroy_process_group()


def meet(world: World, seconds: float) -> Store:
    """Return the store that the ranks share, once all of them have connected to it.

    `init_process_group` would wait for a missing rank too, but cannot name it.

    Raises:
        RanksDiffer: if ranks are missing after `seconds`, or were started with another WORLD_SIZE.
        ValueError: if rank 0 cannot listen at its port, or is not reached.
    """
    store, serves = open_store(world, seconds)
    store.set(f"arrived/{world.rank}", f"{world.size} {socket.gethostname()}")
    if world.is_first:
        store.set("fault", fault_of_arrivals(store, world.size, seconds))
    try:
        # Rank 0 may have come later than this one, and then waits for the others as long.
        store.wait(["fault"], timedelta(seconds=2 * seconds))
        fault = store.get("fault").decode()
    except dist.DistError as error:
        raise ValueError(f"{here(world)} has no answer of rank 0: {first_line(error)}") from error
    if not fault:
        return store
    store.set(f"heard/{world.rank}", "")
    if serves:  # the others read the fault in this process
        with suppress(dist.DistError):
            keys = [f"heard/{r}" for r in range(world.size) if store.check([f"arrived/{r}"])]
            store.wait(keys, timedelta(seconds=FAREWELL_SECONDS))
    raise RanksDiffer(fault)


def open_store(world: World, seconds: float) -> tuple[Store, bool]:
    """Connect to the store of torchrun's agent, or to the one that rank 0 opens without an agent.

    Returns:
        The store, and whether this process serves it.

    Raises:
        ValueError: if rank 0 cannot listen at its port, or is not reached.
    """
    host, port = master_address()
    serves = world.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not serves:
            wait_for_listener(host, port, seconds)
        timeout = timedelta(seconds=seconds)
        store = TCPStore(host, port, None, serves, timeout, wait_for_workers=False)
    except (OSError, dist.DistError) as error:
        reason = first_line(error).rpartition("message: ")[2]
        if serves:
            raise ValueError(
                f"MASTER_PORT: rank 0 on {socket.gethostname()} cannot listen at {port} "
                f"({reason}); expected a free port"
            ) from error
        raise ValueError(
            f"{here(world)} does not reach rank 0 at {host}:{port} (MASTER_ADDR, MASTER_PORT) in "
            f"{seconds:g} seconds: {reason}"
        ) from error
    # The agent's store still holds the keys of the attempt before a restart by torchrun, and those
    # of an earlier run in the same program.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"fastalign/{attempt}/{next(_runs)}", store), serves


def wait_for_listener(host: str, port: int, seconds: float) -> None:
    """Return when something listens there, or raise OSError; TCPStore would log each failed try."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def fault_of_arrivals(store: Store, size: int, seconds: float) -> str:
    """Wait until all ranks are in the store; return a message on those that do not fit, or ''."""
    keys = [f"arrived/{rank}" for rank in range(size)]
    with suppress(dist.DistError):
        store.wait(keys, timedelta(seconds=seconds))
    arrived = [key for key in keys if store.check([key])]
    sizes, hosts = {}, {}
    for key in arrived:
        rank = int(key.partition("/")[2])
        sizes[rank], hosts[rank] = store.get(key).decode().split(" ", 1)
    missing = [rank for rank in range(size) if rank not in hosts]
    if missing:
        come = named(list(hosts), hosts)
        return f"{named(missing, {})} of {size} did not come in {seconds:g} seconds; here: {come}"
    return "; ".join(differing("WORLD_SIZE", [sizes[rank] for rank in range(size)], hosts))


def differing(name: str, values: Sequence[str], hosts: Mapping[int, str]) -> list[str]:
    """Return one message if not all ranks have rank 0's value, else an empty list."""
    others = [rank for rank, value in enumerate(values) if value != values[0]]
    if not others:
        return []
    found = ", ".join(sorted({values[rank] for rank in others}))
    return [f"{name}: {values[0]} on rank 0 on {hosts[0]}, but {found} on {named(others, hosts)}"]


def named(ranks: Sequence[int], hosts: Mapping[int, str]) -> str:
    """Return ranks by machine, where it is known: `ranks 0, 1 on a; rank 2 on b; rank 3`."""
    by_host: dict[str, list[str]] = {}
    for rank in ranks:
        by_host.setdefault(hosts.get(rank, ""), []).append(str(rank))
    return "; ".join(
        f"rank{'s' if len(found) > 1 else ''} {', '.join(found)}" + (f" on {host}" if host else "")
        for host, found in by_host.items()
    )


def master_address() -> tuple[str, int]:
    """Return the host and port of the ranks' store, from the environment.

    Raises:
        ValueError: if a variable is missing, is no port, or is a name without an address.
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


def here(world: World) -> str:
    """Return this process's name in messages."""
    return f"rank {world.rank} of {world.size} on {socket.gethostname()}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
