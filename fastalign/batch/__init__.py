"""Batches: examples packed without padding, and a step's examples cut into micro-batches."""

from fastalign.batch.packed import Group, Layout, PackedBatch, pack, ungroup
from fastalign.batch.schedule import (
    Piece,
    indices_of_step,
    micro_batches,
    packed_batches,
    packed_lengths,
)

__all__ = [
    "Group",
    "Layout",
    "PackedBatch",
    "Piece",
    "indices_of_step",
    "micro_batches",
    "pack",
    "packed_batches",
    "packed_lengths",
    "ungroup",
]
