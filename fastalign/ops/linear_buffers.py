"""How many rows of logits a byte budget holds, and the buffers that hold them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops.linear_head import (
    DEFAULT_BUFFER_ROWS,
    MAX_TILE_ROWS,
    MIN_DEFAULT_BUFFER_BYTES,
    accumulation_dtype,
    product_dtype,
    strip_rows,
)


@dataclass(frozen=True)
class Plan:
    """Rows of each buffer for one call: the tile, a strip of scratch (twice), and kept brackets.

    `tile_rows` is 0 when every row is kept in the accumulation dtype: rows are then projected
    straight into the place where their brackets stay.
    """

    tile_rows: int
    scratch_rows: int
    kept_rows: int


def default_budget(num_columns: int, itemsize: int) -> int:
    """Room for 4,096 rows of logits, and not less than 256 MiB."""
    return max(DEFAULT_BUFFER_ROWS * num_columns * itemsize, MIN_DEFAULT_BUFFER_BYTES)


def plan_buffers(
    num_rows: int,
    num_columns: int,
    compute_dtype: torch.dtype,
    device_type: str,
    max_buffer_bytes: int | None,
    *,
    keep: bool,
    convert: bool,
    tile: bool = False,
) -> Plan:
    """Divides the budget between a working tile and kept brackets.

    Args:
        num_rows: Rows of the call.
        num_columns: V.
        compute_dtype: The products' dtype.
        device_type: "cpu" or "cuda".
        max_buffer_bytes: The budget, or None for `default_budget`.
        keep: Whether brackets are kept for products that come later.
        convert: Whether brackets are multiplied in this pass (they need a place in the products'
            dtype while the tile is in the accumulation dtype).
        tile: Whether a working tile is wanted even where every row is kept (rows may have to be
            read again).

    Raises:
        ValueError: The budget does not hold the smallest tile.
    """
    item = accumulation_dtype(compute_dtype).itemsize
    kept_item = product_dtype(compute_dtype, device_type).itemsize
    same = item == kept_item
    budget = default_budget(num_columns, item) if max_buffer_bytes is None else max_buffer_bytes
    columns = max(num_columns, 1)
    smallest = 3 * item * columns + (0 if same else kept_item * columns)
    if budget < smallest:
        raise ValueError(
            f"max_buffer_bytes: expected at least {smallest} (one row of {num_columns} logits and "
            f"its scratch), got {budget}"
        )

    def scratch_for(rows: int) -> int:
        return strip_rows(num_columns, rows, device_type)

    if keep and same and not tile:
        scratch = scratch_for(num_rows)
        if (num_rows + 2 * scratch) * item * columns <= budget:
            return Plan(0, scratch, num_rows)
    extra = kept_item if convert and not same else 0
    share = budget // 4 if keep and budget // 4 >= smallest else budget
    rows = max(1, min(num_rows, MAX_TILE_ROWS, share * 4 // (columns * (5 * item + 4 * extra))))
    while rows > 1 and (rows * (item + extra) + 2 * scratch_for(rows) * item) * columns > share:
        rows -= 1
    used = (rows * (item + extra) + 2 * scratch_for(rows) * item) * columns
    kept = min(num_rows, (budget - used) // (columns * kept_item)) if keep else 0
    return Plan(rows, scratch_for(rows), kept)


class Buffers:
    """The scratch memory of one call, allocated once and reused by every tile."""

    def __init__(
        self, plan: Plan, num_columns: int, compute_dtype: torch.dtype, device: torch.device
    ) -> None:
        self._columns = num_columns
        self._dtype = accumulation_dtype(compute_dtype)
        self._product_dtype = product_dtype(compute_dtype, device.type)
        self._device = device
        self._plan = plan
        self._tile: Tensor | None = None
        self._converted: Tensor | None = None
        self.scratch = torch.empty(
            (2, plan.scratch_rows, num_columns), dtype=self._dtype, device=device
        )

    @property
    def projects_in_place(self) -> bool:
        """Whether kept rows are projected straight into the place of their brackets."""
        return self._product_dtype == self._dtype

    @property
    def tile_rows(self) -> int:
        """How many rows one product of the forward has."""
        return self._plan.tile_rows or MAX_TILE_ROWS

    def new_kept(self, rows: int) -> Tensor:
        """A place (rows, V) for brackets, in the products' dtype."""
        return self._empty(rows, self._product_dtype)

    def tile(self, rows: int) -> Tensor:
        """The working tile's first rows, (rows, V), in the accumulation dtype."""
        if self._tile is None:
            self._tile = self._empty(self._plan.tile_rows, self._dtype)
        return self._tile[:rows]

    def converted(self, rows: int) -> Tensor:
        """A place for the brackets of the tile's first rows: the tile itself where dtypes agree."""
        if self._product_dtype == self._dtype:
            return self.tile(rows)
        if self._converted is None:
            self._converted = self._empty(self._plan.tile_rows, self._product_dtype)
        return self._converted[:rows]

    def _empty(self, rows: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, self._columns), dtype=dtype, device=self._device)
