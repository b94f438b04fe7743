"""Bytes that `fused_linear_loss` allocates, by the plan of its buffers.

Legend: T rows, V vocabulary, D hidden.
"""

from dataclasses import dataclass

import torch

from fastalign.ops.head.buffers import Budget, padded_columns
from fastalign.ops.head.fused_linear_loss.chunked import balanced_capacity
from fastalign.ops.head.products import accumulation_dtype, product_dtype, strip_rows


@dataclass(frozen=True)
class Footprint:
    """Bytes beside the arguments, vectors of T left out.

    Attributes:
        num_chunks: chunks of the sweep.
        tile_rows: rows of the working tile; 0 where rows are projected into their brackets.
        forward: most at one time in the forward.
        held: from the forward to the backward.
        backward: most at one time in the backward, those held among them.
    """

    num_chunks: int
    tile_rows: int
    forward: int
    held: int
    backward: int

    @property
    def peak(self) -> int:
        """Most at one time."""
        return max(self.forward, self.backward)


def footprint(
    budget: Budget, num_rows: int, hidden_size: int, leaf_dtype: torch.dtype
) -> Footprint:
    """Return the footprint of a call that trains hidden and weight, of groups of one row.

    Args:
        budget: decides the sizes of the buffers; it saves brackets.
        num_rows: T.
        hidden_size: D.
        leaf_dtype: dtype of hidden states and weight.
    """
    device, dtype = budget.device.type, budget.compute_dtype
    low, wide = product_dtype(dtype, device), accumulation_dtype(dtype)
    leaf, columns = leaf_dtype.itemsize, budget.num_columns
    rows = balanced_capacity(range(num_rows + 1), budget.most_saved_rows(num_rows))
    plan, num_chunks = budget.plan(rows), -(-num_rows // rows)
    stride = padded_columns(columns, device)
    brackets = rows * stride * low.itemsize
    tile = (plan.tile_rows + 2 * plan.scratch_rows) * stride * wide.itemsize
    of_weight, of_hidden = columns * hidden_size, num_rows * hidden_size
    copies = (of_weight + of_hidden) * low.itemsize if leaf_dtype != low else 0
    jacobian, weighted = rows * hidden_size * wide.itemsize, rows * hidden_size * low.itemsize
    if num_chunks == 1:
        held = brackets + jacobian
        forward = max(copies + tile + brackets, copies + tile + held)
        strip = 0
        if leaf_dtype not in (wide, low):
            strip = min(strip_rows(hidden_size, device), columns) * hidden_size * wide.itemsize
        low_hidden = of_hidden * low.itemsize if leaf_dtype != low else 0
        backward = held + (of_hidden + of_weight) * leaf + low_hidden + weighted + strip
        return Footprint(1, plan.tile_rows, forward, held, backward)
    held = of_weight * wide.itemsize + of_hidden * leaf
    forward = copies + tile + brackets + held + jacobian + weighted
    backward = held + (of_weight * leaf if leaf_dtype != wide else 0)
    return Footprint(num_chunks, plan.tile_rows, forward, held, backward)
