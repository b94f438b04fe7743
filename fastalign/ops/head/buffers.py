"""How many rows of logits a byte budget holds, and the buffers that hold them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastalign.ops.head.head_tile.strips import strip_rows
from fastalign.ops.head.products import accumulation_dtype, product_dtype

MAX_TILE_ROWS = 2048
TILE_ROWS_MULTIPLE = 32  # products of whole blocks
# A tile beside brackets that are kept should have this many: products of fewer rows are slow.
GOOD_TILE_ROWS = 256
# Brackets of fewer rows than this share of a call's are not worth the room that they take.
MIN_KEPT_SHARE = 0.25
# A CPU's products keep their speed in smaller tiles than a GPU's.
DEFAULT_BUFFER_ROWS = {"cpu": 1024, "cuda": 4096}
DEFAULT_BYTES_PER_LOGIT = 3  # a kept row in two bytes, and a quarter as many in four
MIN_DEFAULT_BUFFER_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Plan:
    """Rows of each buffer for one call: the tile, a strip of scratch (twice), and kept brackets.

    `tile_rows` is 0 when every row is kept in the accumulation dtype: rows are then projected
    straight into the place where their brackets stay.
    """

    tile_rows: int
    scratch_rows: int
    kept_rows: int


def free_bytes(device: torch.device) -> int | None:
    """Memory that could still be allocated on the device; None where the system cannot tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    table = Path("/proc/meminfo")
    if device.type != "cpu" or not table.exists():
        return None
    (line,) = (line for line in table.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def default_budget(
    num_columns: int,
    compute_dtype: torch.dtype,
    device: torch.device,
    *,
    within_free_memory: bool = True,
) -> int:
    """Room to keep 4,096 rows in bfloat16 on a GPU, 1,024 on a CPU, with a tile a quarter as high.

    At least 64 MiB (of float32, three quarters as many rows; of float64, as many in twice the
    bytes). Halved until it is at most half of the free memory: in steps, so that sums are not
    rounded in another order whenever a little more or less memory is free. Not halved where
    processes that have to agree might see different memory.
    """
    rows = DEFAULT_BUFFER_ROWS.get(device.type, DEFAULT_BUFFER_ROWS["cuda"])
    bytes_per_row = num_columns * DEFAULT_BYTES_PER_LOGIT
    if compute_dtype == torch.float64:
        bytes_per_row *= 2
    budget = max(rows * bytes_per_row, MIN_DEFAULT_BUFFER_BYTES)
    free = None
    if within_free_memory and not torch.compiler.is_compiling():
        free = free_bytes(device)
    while free is not None and budget > max(free // 2, MIN_DEFAULT_BUFFER_BYTES):
        budget //= 2
    return budget


def _whole_blocks(rows: int) -> int:
    return rows - rows % TILE_ROWS_MULTIPLE if rows > TILE_ROWS_MULTIPLE else rows


def plan_buffers(
    num_rows: int,
    num_columns: int,
    compute_dtype: torch.dtype,
    device_type: str,
    max_buffer_bytes: int,
    *,
    scratch: bool,
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
        max_buffer_bytes: The budget.
        scratch: Whether the pass over a tile needs strips of scratch, as PyTorch's does.
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
    columns = max(num_columns, 1)
    smallest = (3 if scratch else 1) * item * columns + (0 if same else kept_item * columns)
    if max_buffer_bytes < smallest:
        raise ValueError(
            f"max_buffer_bytes: expected at least {smallest} (one row of {num_columns} logits"
            f"{' and its scratch' if scratch else ''}), got {max_buffer_bytes}"
        )

    def scratch_for(rows: int) -> int:
        return strip_rows(num_columns, rows, device_type) if scratch else 0

    if keep and same and not tile:
        strip = scratch_for(num_rows)
        if (num_rows + 2 * strip) * item * columns <= max_buffer_bytes:
            return Plan(0, strip, num_rows)
    if keep and not same and not tile:
        # no bracket is multiplied but those kept, so the tile needs no place to be converted in
        room = (max_buffer_bytes // columns - num_rows * kept_item) // item
        rows = min(num_rows, MAX_TILE_ROWS, room)
        while rows > 0 and rows + 2 * scratch_for(rows) > room:
            rows -= 1
        if rows >= min(GOOD_TILE_ROWS, num_rows):
            return Plan(_whole_blocks(rows), scratch_for(rows), num_rows)
    extra = kept_item if convert and not same else 0
    # Where few rows could be kept, higher tiles save more: each one rereads the weight's gradient.
    keep = keep and MIN_KEPT_SHARE * num_rows * columns * kept_item <= max_buffer_bytes
    quarter = max_buffer_bytes // 4
    share = quarter if keep and quarter >= smallest else max_buffer_bytes
    bytes_per_row = (item + extra + (item // 4 if scratch else 0)) * columns
    rows = max(1, min(num_rows, MAX_TILE_ROWS, share // bytes_per_row))
    rows = _whole_blocks(rows)
    while rows > 1 and (rows * (item + extra) + 2 * scratch_for(rows) * item) * columns > share:
        rows -= 1
    used = (rows * (item + extra) + 2 * scratch_for(rows) * item) * columns
    kept = min(num_rows, (max_buffer_bytes - used) // (columns * kept_item)) if keep else 0
    return Plan(rows, scratch_for(rows), kept)


class Buffers:
    """The scratch memory of one call, allocated once and reused by every tile."""

    def __init__(
        self,
        plan: Plan,
        num_columns: int,
        compute_dtype: torch.dtype,
        device: torch.device,
        backend: str,
    ) -> None:
        self.backend = backend
        self._columns = num_columns
        self._dtype = accumulation_dtype(compute_dtype)
        self._product_dtype = product_dtype(compute_dtype, device.type)
        self._device = device
        self._plan = plan
        self._tile: Tensor | None = None
        self._converted: Tensor | None = None
        self.scratch: Tensor | None = None
        if backend == "torch":
            shape = (2, plan.scratch_rows, num_columns)
            self.scratch = torch.empty(shape, dtype=self._dtype, device=device)

    @property
    def projects_in_place(self) -> bool:
        """Whether kept rows are projected straight into the place of their brackets."""
        return self._product_dtype == self._dtype

    @property
    def tile_rows(self) -> int:
        """How many rows one product of the forward has."""
        return self._plan.tile_rows or MAX_TILE_ROWS

    def lend(self, kept: Tensor) -> None:
        """Lets the brackets of every row, read no more, be the places that the plan has not."""
        if not self.projects_in_place:
            self._converted = kept
        elif self._plan.tile_rows == 0:
            self._tile = kept

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
