"""Votes that come while others are written share the next write; none counts before it is kept."""

import asyncio
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from fastalign.compare.app import VoteWriter
from fastalign.compare.store import NewVote, Store, Vote
from tests.compare.site import new_store


class SlowStore:
    """A database whose first write waits."""

    def __init__(self, store: Store):
        self.store, self.batches = store, list[int]()
        self.begun, self.goes_on = threading.Event(), threading.Event()
        self.faults: list[Exception] = []

    def add_votes(self, votes: Iterable[NewVote]) -> list[Vote | None]:
        found = list(votes)
        self.batches.append(len(found))
        self.begun.set()
        assert self.goes_on.wait(60)
        if self.faults:
            raise self.faults.pop()
        return self.store.add_votes(found)


def vote(store: Store, pair: int, nonce: str | None = None) -> NewVote:
    return NewVote(pair, store.annotator("me").id, "a", "b", "random", nonce or f"nonce {pair}")


async def while_one_is_written(slow: SlowStore, writer: VoteWriter, *votes: NewVote) -> list[Any]:
    """Add the first vote, and the others while it is being written."""
    first = asyncio.create_task(writer.add(votes[0]))
    await asyncio.to_thread(slow.begun.wait, 60)
    others = [asyncio.create_task(writer.add(each)) for each in votes[1:]]
    await asyncio.sleep(0)  # each has been handed over
    slow.goes_on.set()
    return await asyncio.gather(first, *others, return_exceptions=True)


def test_votes_of_a_write_come_together_and_are_counted_when_they_are_kept(tmp_path: Path) -> None:
    store = new_store(tmp_path, 6)
    slow, counted = SlowStore(store), list[int]()

    def take(found: Vote | None) -> bool:
        if found is not None:
            assert found in store.votes()
            counted.append(found.pair)
        return found is not None

    votes = [vote(store, pair) for pair in (1, 2, 3, 4)] + [vote(store, 5, "nonce 2")]
    added = asyncio.run(while_one_is_written(slow, VoteWriter(slow, take), *votes))  # type: ignore[arg-type]
    assert added == [True, True, True, True, False], "a form that is sent twice is one vote"
    assert slow.batches == [1, 4]
    assert counted == [1, 2, 3, 4]
    with sqlite3.connect(store.path) as other:
        assert other.execute("SELECT count(*) FROM votes").fetchone() == (4,)


def test_a_write_that_fails_counts_nothing_and_the_next_is_made(tmp_path: Path) -> None:
    store = new_store(tmp_path, 3)
    slow, counted = SlowStore(store), list[Vote | None]()
    slow.faults = [sqlite3.OperationalError("database or disk is full")]
    writer = VoteWriter(slow, lambda found: not counted.append(found))  # type: ignore[arg-type, func-returns-value]

    async def both() -> list[Any]:
        found = await while_one_is_written(slow, writer, vote(store, 1), vote(store, 2))
        return [*found, await writer.add(vote(store, 1))]

    first, second, again = asyncio.run(both())
    assert isinstance(first, sqlite3.OperationalError)
    assert (second, again) == (True, True)
    assert [found and found.pair for found in counted] == [2, 1]


def test_a_vote_that_cannot_be_counted_leaves_the_next_one_alone(tmp_path: Path) -> None:
    store = new_store(tmp_path, 3)

    def take(found: Vote | None) -> bool:
        assert found is not None
        if found.pair == 1:
            raise KeyError("a person who has left")
        return True

    async def both() -> list[Any]:
        writer = VoteWriter(store, take)
        first = await asyncio.gather(writer.add(vote(store, 1)), return_exceptions=True)
        return [*first, await asyncio.wait_for(writer.add(vote(store, 2)), 60)]

    first, second = asyncio.run(both())
    assert isinstance(first, KeyError)
    assert second


def test_a_request_that_is_given_up_loses_no_vote(tmp_path: Path) -> None:
    store = new_store(tmp_path, 3)
    slow, counted = SlowStore(store), list[Vote | None]()
    writer = VoteWriter(slow, lambda found: not counted.append(found))  # type: ignore[arg-type, func-returns-value]

    async def give_up() -> bool:
        task = asyncio.create_task(writer.add(vote(store, 1)))
        await asyncio.to_thread(slow.begun.wait, 60)
        task.cancel()
        slow.goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await writer.add(vote(store, 2))

    assert asyncio.run(give_up())
    assert [found and found.pair for found in counted] == [1, 2]
    assert len(store.votes()) == 2
