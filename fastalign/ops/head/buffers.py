"""The division of a byte budget between tiles of logits and saved brackets; the buffers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastalign.ops.head.head_tile.torch_strips import strip_rows
from fastalign.ops.head.products import accumulation_dtype, product_dtype

MAX_TILE_ROWS = 2048
TILE_ROWS_MULTIPLE = 32  # products of whole blocks
# A tile beside saved brackets should have this many: products of fewer rows are slow.
GOOD_TILE_ROWS = 256
# Brackets of fewer rows than this share of a call's are not worth the memory that they take.
MIN_SAVED_SHARE = 0.25
# A CPU's products keep their speed in smaller tiles than a GPU's.
DEFAULT_BUFFER_ROWS = {"cpu": 1024, "cuda": 4096}
# On a GPU rows begin this many elements apart, or a multiple of it: at 16 bytes, which kernels and
# library products need for their widest accesses, and at which equal rows give equal bits. Triton
# compiles for strides that are multiples of 16.
ROW_MULTIPLE = {"cpu": 1, "cuda": 16}
# "epilogue" keeps three float32 numbers for each row and block of columns. A block is no narrower,
# and no higher.
EPILOGUE_COLUMNS, EPILOGUE_ROWS, EPILOGUE_BYTES = 64, 256, 12
MAX_EPILOGUE_ROWS = 2**14
DEFAULT_BYTES_PER_LOGIT = 3  # a saved row in two bytes, and a quarter as many in four
MIN_DEFAULT_BUFFER_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Plan:
    """Rows of each buffer for one call: the tile, a strip of scratch (twice), saved brackets.

    `tile_rows` is 0 when every bracket is saved in the accumulation dtype: rows are then projected
    straight into the memory of their brackets.
    """

    tile_rows: int
    scratch_rows: int
    saved_rows: int


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that could still be allocated; None where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    table = Path("/proc/meminfo")
    if device.type != "cpu" or not table.exists():
        return None
    (line,) = (line for line in table.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def padded_columns(num_columns: int, device_type: str) -> int:
    """Return the row stride of a buffer with that many columns, in elements."""
    multiple = ROW_MULTIPLE.get(device_type, ROW_MULTIPLE["cuda"])
    return -(-num_columns // multiple) * multiple


def empty_rows(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised matrix whose rows are `padded_columns` apart."""
    stride = padded_columns(num_columns, device.type)
    return torch.empty((num_rows, stride), dtype=dtype, device=device)[:, :num_columns]


def default_budget(
    num_columns: int,
    compute_dtype: torch.dtype,
    device: torch.device,
    *,
    within_free_memory: bool = True,
) -> int:
    """Return the bytes that save 4,096 rows in bfloat16 on a GPU, 1,024 on a CPU, beside a tile.

    The tile is a quarter as high. At least 64 MiB (of float32, three quarters as many rows; of
    float64, as many in twice the bytes). Halved until it is at most half of the free memory: in
    steps, so that sums are not rounded in another order whenever a little more or less memory is
    free. Not halved where processes that have to agree might see different memory.
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
    """Round down to a multiple of `TILE_ROWS_MULTIPLE`, unless that is 0."""
    return rows - rows % TILE_ROWS_MULTIPLE if rows > TILE_ROWS_MULTIPLE else rows


@dataclass(frozen=True)
class Budget:
    """Inputs that decide the sizes of a call's buffers, all but the number of rows.

    Attributes:
        num_columns: columns to plan for: V, or those of a shared vocabulary's largest shard.
        compute_dtype: dtype of the products.
        device: device of the buffers.
        max_buffer_bytes: most bytes of all buffers together.
        backend: backend of the pass over a tile; "torch" needs strips of scratch.
        save: True if brackets are saved for products that come later.
        convert: True if brackets are multiplied in this pass; they then need memory in the
            products' dtype while the tile is in the accumulation dtype.
        reread: True if a working tile is wanted even where every bracket is saved, because rows
            may have to be read again.
        columns_here: columns of the buffers themselves, if not `num_columns`.
    """

    num_columns: int
    compute_dtype: torch.dtype
    device: torch.device
    max_buffer_bytes: int
    backend: str
    save: bool
    convert: bool
    reread: bool = False
    columns_here: int | None = None

    def buffers(self, num_rows: int) -> "Buffers":
        """Return scratch memory for a call or chunk of `num_rows`."""
        columns = self.num_columns if self.columns_here is None else self.columns_here
        plan = self.plan(num_rows)
        return Buffers(plan, columns, self.compute_dtype, self.device, self.backend)

    def most_saved_rows(self, most: int) -> int:
        """Return the largest chunk, of 1 to `most` rows, whose brackets can all be saved."""
        low, high = 1, max(most, 1)
        while low < high:
            middle = (low + high + 1) // 2
            if self.plan(middle).saved_rows >= middle:
                low = middle
            else:
                high = middle - 1
        return low

    def plan(self, num_rows: int) -> Plan:
        """Divide the budget between a working tile and saved brackets.

        Raises:
            ValueError: if the budget does not hold the smallest tile.
        """
        if self.backend == "epilogue":
            return Plan(min(num_rows, self._epilogue_rows()), 0, 0)
        item = accumulation_dtype(self.compute_dtype).itemsize
        saved_item = product_dtype(self.compute_dtype, self.device.type).itemsize
        same = item == saved_item
        columns, budget = self._stride, self.max_buffer_bytes
        smallest = self._check(item, 0 if same else saved_item)
        if self.save and same and not self.reread:
            strip = self._strip_rows(num_rows)
            if (num_rows + 2 * strip) * item * columns <= budget:
                return Plan(0, strip, num_rows)
        if self.save and not same and not self.reread:
            # No bracket is multiplied but those saved: the tile is never converted.
            room = (budget // columns - num_rows * saved_item) // item
            rows = min(num_rows, MAX_TILE_ROWS, room)
            while rows > 0 and rows + 2 * self._strip_rows(rows) > room:
                rows -= 1
            if rows >= min(GOOD_TILE_ROWS, num_rows):
                return Plan(_whole_blocks(rows), self._strip_rows(rows), num_rows)
        extra = saved_item if self.convert and not same else 0
        # Where few rows could be saved, higher tiles gain more: each one rereads the weight's
        # gradient.
        save = self.save and MIN_SAVED_SHARE * num_rows * columns * saved_item <= budget
        share = budget // 4 if save and budget // 4 >= smallest else budget
        bytes_per_row = (item + extra + (item // 4 if self.backend == "torch" else 0)) * columns
        rows = _whole_blocks(max(1, min(num_rows, MAX_TILE_ROWS, share // bytes_per_row)))

        def used(rows: int) -> int:
            return (rows * (item + extra) + 2 * self._strip_rows(rows) * item) * columns

        while rows > 1 and used(rows) > share:
            rows -= 1
        saved = min(num_rows, (budget - used(rows)) // (columns * saved_item)) if save else 0
        return Plan(rows, self._strip_rows(rows), saved)

    def _epilogue_rows(self) -> int:
        """Return the rows of one launch of "epilogue"; raise unless the budget holds a block."""
        bytes_per_row = -(-self.num_columns // EPILOGUE_COLUMNS) * EPILOGUE_BYTES
        rows = min(MAX_EPILOGUE_ROWS, self.max_buffer_bytes // bytes_per_row)
        if rows < EPILOGUE_ROWS:
            raise ValueError(
                f"max_buffer_bytes: expected at least {EPILOGUE_ROWS * bytes_per_row} (statistics "
                f"of {EPILOGUE_ROWS} rows), got {self.max_buffer_bytes}"
            )
        return rows - rows % EPILOGUE_ROWS

    @property
    def _stride(self) -> int:
        """Row stride of the buffers to plan for, at least 1."""
        return padded_columns(max(self.num_columns, 1), self.device.type)

    def _strip_rows(self, rows: int) -> int:
        """Return the rows of a strip of scratch for a tile of `rows`."""
        if self.backend != "torch":
            return 0
        return strip_rows(self.num_columns, rows, self.device.type)

    def _check(self, item: int, converted_item: int) -> int:
        """Return the bytes of the smallest tile; raise unless the budget holds it."""
        scratch = self.backend == "torch"
        smallest = ((3 if scratch else 1) * item + converted_item) * self._stride
        if self.max_buffer_bytes < smallest:
            raise ValueError(
                f"max_buffer_bytes: expected at least {smallest} (one row of {self.num_columns} "
                f"logits{' and its scratch' if scratch else ''}), got {self.max_buffer_bytes}"
            )
        return smallest


class Buffers:
    """Scratch memory of one call, allocated once and reused by every tile."""

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
        """True if saved rows are projected straight into the memory of their brackets."""
        return self._product_dtype == self._dtype

    @property
    def tile_rows(self) -> int:
        """Rows of one product of the forward."""
        return self._plan.tile_rows or MAX_TILE_ROWS

    def reuse(self, brackets: Tensor) -> None:
        """Reuse saved brackets as scratch once every row's bracket has been consumed."""
        if not self.projects_in_place:
            self._converted = brackets
        elif self._plan.tile_rows == 0:
            self._tile = brackets

    def new_brackets(self) -> Tensor:
        """Return an empty (K, V) for the brackets that the plan saves, in the products' dtype."""
        return self._empty(self._plan.saved_rows, self._product_dtype)

    def tile(self, rows: int) -> Tensor:
        """Return the working tile's first rows, (rows, V), in the accumulation dtype."""
        if self._tile is None:
            self._tile = self._empty(self._plan.tile_rows, self._dtype)
        return self._tile[:rows]

    def converted(self, rows: int) -> Tensor:
        """Return memory for the brackets of those rows: the tile itself where dtypes agree."""
        if self._product_dtype == self._dtype:
            return self.tile(rows)
        if self._converted is None:
            self._converted = self._empty(self._plan.tile_rows, self._product_dtype)
        return self._converted[:rows]

    def _empty(self, rows: int, dtype: torch.dtype) -> Tensor:
        return empty_rows(rows, self._columns, dtype, self._device)
