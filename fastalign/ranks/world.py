"""The processes of one run, as `torchrun` starts them: who this one is, and what all agree on.

A run of one process needs no process group; every method is then the identity.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

T = TypeVar("T")


RANK_FAILED = 4  # exit code of a rank that ends because another is gone


class RankFailed(RuntimeError):
    """Another rank of the run is gone; the message names it."""


@dataclass(frozen=True)
class World:
    """This process among those of its run.

    Whether there are others is said by `size` alone: a library may have opened a process group of
    its own in a run of one process.

    Attributes:
        rank: from 0.
        size: processes of the run.
        local_rank: on this machine, from 0; the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the ranks' order, on every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def of_first(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found)
        return found[0]

    def first_does(
        self, work: Callable[[], T], errors: tuple[type[Exception], ...] = (ValueError, OSError)
    ) -> T:
        """What the work returns on rank 0, on every rank; what it raises there is raised on all.

        Args:
            work: is done on rank 0 alone.
            errors: that it may raise; others end rank 0 only.
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
        """Returns when every rank has come here."""
        self.gather(None)

    def part_of(self, count: int) -> range:
        """This rank's share of `count` things in a row; shares differ by one at most."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)


ALONE = World()


def world_of_environment() -> World:
    """What `torchrun` says of this process; without it, a run of one.

    Raises:
        ValueError: a variable is missing, or is no number in its range.
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
    """Joins the ranks in a process group: gloo for host memory, NCCL for GPUs.

    Args:
        world: of this process.
        timeout_seconds: that a rank waits for the others before it gives up.
        always: a run of one process gets a group too.

    Raises:
        ValueError: the ranks do not meet in time.
    """
    if world.size == 1 and not always:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    alone: dict[str, Any] = {"store": HashStore(), "rank": 0, "world_size": 1}
    try:
        dist.init_process_group(
            backend,
            timeout=timedelta(seconds=timeout_seconds),
            **(alone if world.size == 1 else {}),
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"rank {world.rank} of {world.size} on {socket.gethostname()}: the ranks did not meet "
            f"at {address}: {first}"
        ) from error
    try:
        yield
    except BaseException:
        if world.size == 1:
            dist.destroy_process_group()
        raise  # with others, the process ends: taking leave would wait for them
    dist.destroy_process_group()
