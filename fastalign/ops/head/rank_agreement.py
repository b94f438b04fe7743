"""Checks of arguments on all ranks together: where one has to raise, all do, and none waits."""

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastalign.ops.head.vocabulary_shard import VocabularyShard

Checked = TypeVar("Checked")
Facts = dict[str, Any]


def checked_together(shard: VocabularyShard, check: Callable[[], tuple[Checked, Facts]]) -> Checked:
    """Return what `check` returns on this rank, once every rank's has returned the same facts.

    One collective of 32 bytes a rank, on the host: no GPU is waited for. A group without a backend
    for CPU tensors (NCCL alone) has none: there, a rank whose check raises does so alone.

    Args:
        shard: shard of this rank.
        check: function that returns a result, and facts that must be the same on all ranks.

    Raises:
        ValueError: if another rank's check raised, facts differ, or the shards do not cover the
            vocabulary once. An error of this rank's own check is raised in preference.
    """
    found: tuple[Checked, Facts] | None = None
    error: Exception | None = None
    try:
        found = check()
    except Exception as raised:  # of any kind: the other ranks must learn of it
        error = raised
    if "cpu:" in dist.get_backend_config(shard.process_group):
        disagreement = _disagreement(shard, {} if found is None else found[1], error)
        error = error or disagreement
    if error is not None:
        raise error
    assert found is not None
    return found[0]


def _disagreement(
    shard: VocabularyShard, facts: Facts, error: Exception | None
) -> ValueError | None:
    """Return the error that every rank has to raise, or None; all ranks decide alike."""
    group = shard.process_group
    digest = zlib.crc32(repr(facts).encode())
    mine = torch.tensor([error is None, digest, shard.start, shard.stop], dtype=torch.int64)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    rows = [row.tolist() for row in gathered]
    if any(row[:2] != [1, digest] for row in rows):
        reports: list[Any] = [None] * len(rows)
        dist.all_gather_object(reports, (None if error is None else str(error), facts), group=group)
        return _explained(reports, dist.get_rank(group))
    spans = sorted((start, stop) for _, _, start, stop in rows if start < stop)
    borders = [0, *(border for span in spans for border in span), shard.vocab_size]
    if any(one != other for one, other in zip(borders[::2], borders[1::2], strict=True)):
        shown = ", ".join(f"{start}..{stop}" for _, _, start, stop in rows)
        return ValueError(
            f"vocabulary_shard: expected shards that cover 0..{shard.vocab_size} once, got {shown}"
        )
    return None


def _explained(reports: list[tuple[str | None, Facts]], rank: int) -> ValueError:
    """Return an error that names the rank that raised, or the first fact that differs."""
    for other, (message, _) in enumerate(reports):
        if message is not None:
            return ValueError(f"vocabulary_shard: rank {other} of the group raised: {message}")
    facts = reports[rank][1]
    for other, (_, theirs) in enumerate(reports):
        for name, value in facts.items():
            if theirs.get(name) != value:
                return ValueError(
                    f"{name}: expected the same on every rank of the vocabulary's group, "
                    f"got {value} on rank {rank}, {theirs.get(name)} on rank {other}"
                )
    raise AssertionError("digests differ, facts do not")
