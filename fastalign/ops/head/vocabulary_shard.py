"""The rows of a head that one process of a group holds: only the vocabulary is split.

Every rank has the same hidden states (T, D) and targets (global ids), and its own rows
start..stop of the head's weight (V, D) and bias (V,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabularyShard:
    """Rows start..stop of a head of `vocab_size` rows, on this rank of a process group.

    The shards of all ranks cover the vocabulary once, in any order; one may be empty.

    Attributes:
        process_group: ranks that share the vocabulary; None: the default group.
        start: first row of this rank.
        stop: one past its last row.
        vocab_size: rows of all shards together.
        largest: rows of the largest shard, from which every rank plans the same chunks; None:
            those of an even split, `vocab_size` over the number of ranks, rounded up.
    """

    process_group: ProcessGroup | None
    start: int
    stop: int
    vocab_size: int
    largest: int | None = None

    @classmethod
    def even(cls, process_group: ProcessGroup | None, vocab_size: int) -> VocabularyShard:
        """Return this rank's part of the split of `torch.chunk` and of a DTensor sharded by rows.

        Each rank takes `vocab_size` over the number of ranks, rounded up, as long as there are
        rows; the last shards may be smaller, or empty.
        """
        size = _rounded_up(vocab_size, dist.get_world_size(process_group))
        start = min(dist.get_rank(process_group) * size, vocab_size)
        return cls(process_group, start, min(start + size, vocab_size), vocab_size)

    @property
    def num_planned_columns(self) -> int:
        """The columns that buffers are planned for, the same on every rank."""
        if self.largest is not None:
            return self.largest
        return _rounded_up(self.vocab_size, dist.get_world_size(self.process_group))

    def check(self, weight: Tensor) -> None:
        """Check the shard, and that the weight has its rows.

        Raises:
            ValueError: if one is wrong, naming what was expected and what came.
        """
        here = f"{self.start}..{self.stop}"
        if dist.get_rank(self.process_group) < 0:
            raise ValueError(
                "vocabulary_shard: expected a process group with this rank in it, "
                f"got one without rank {dist.get_rank()}"
            )
        if not 0 <= self.start <= self.stop <= self.vocab_size:
            raise ValueError(
                f"vocabulary_shard: expected rows within 0..{self.vocab_size}, got {here}"
            )
        if self.stop - self.start > self.num_planned_columns:
            raise ValueError(
                f"vocabulary_shard: expected at most {self.num_planned_columns} rows a shard, or "
                f"the most of any as `largest`, got {here}"
            )
        if weight.ndim == 2 and weight.shape[0] != self.stop - self.start:
            raise ValueError(
                f"weight: expected the {self.stop - self.start} rows {here} of the vocabulary's "
                f"shard, got {tuple(weight.shape)}"
            )
        known = dist.get_backend_config(self.process_group)
        if f"{weight.device.type}:" not in known:
            raise ValueError(
                f"vocabulary_shard: expected a process group for {weight.device.type} tensors, "
                f"got one of {known!r}"
            )


def _rounded_up(vocab_size: int, num_ranks: int) -> int:
    return -(-vocab_size // num_ranks)
