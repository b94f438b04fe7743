"""Blocks and warps of each Triton kernel: a table measured beforehand, never in a run.

`triton_table.json` lists configurations of each kernel, each with the oldest compute capability
that it is for (80 for 8.0) and the GPU that it was measured on; null means an estimate. `python -m
benchmarks.tune` measures on the GPU of its machine and writes the table.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

TABLE = Path(__file__).with_suffix(".json")
OLDEST = 80
# Blocks narrower than this have too little work for more than four warps.
FEW_COLUMNS = 2048


@dataclass(frozen=True)
class Entry:
    """One configuration of a kernel, and the oldest compute capability that it is for."""

    from_capability: int


@dataclass(frozen=True)
class Configuration(Entry):
    """One kernel's widest block of columns, and the warps that share it."""

    block: int
    num_warps: int
    measured_on: str | None

    def options(self, num_columns: int) -> dict[str, int]:
        """Return BLOCK and num_warps of a launch for rows of `num_columns`."""
        block = min(self.block, triton.next_power_of_2(num_columns))
        return {"BLOCK": block, "num_warps": self.num_warps if block >= FEW_COLUMNS else 4}


@dataclass(frozen=True)
class ProductConfiguration(Entry):
    """Tiles of a head's own product, for operands of `element_bytes`.

    Attributes:
        block_rows: rows of hidden states in a program's tile.
        block_columns: rows of the weight in it.
        block_hidden: terms of the sum that are loaded at a time.
        group_rows: blocks of rows whose programs run together.
        num_warps: warps of a program.
        num_stages: blocks that are loaded ahead.
        preferred: True if a GPU was faster with it than with the library's product and a pass.
        measured_on: that GPU, or None.
    """

    element_bytes: int
    block_rows: int
    block_columns: int
    block_hidden: int
    group_rows: int
    num_warps: int
    num_stages: int
    preferred: bool
    measured_on: str | None

    def options(self) -> dict[str, int]:
        """Return the options of a launch."""
        return {
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_COLUMNS": self.block_columns,
            "BLOCK_HIDDEN": self.block_hidden,
            "group_rows": self.group_rows,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


PRODUCT = "head_product_kernel"
E = TypeVar("E", bound=Entry)


def _read(kind: type[E], entries: Sequence[dict[str, Any]]) -> list[E]:
    """Return a kernel's configurations, the newest capability first."""
    made = [kind(**entry) for entry in entries]
    return sorted(made, key=lambda entry: entry.from_capability, reverse=True)


@lru_cache(maxsize=1)
def read_table() -> dict[str, list[Configuration]]:
    """Return the configurations of each kernel on rows."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: _read(Configuration, table[name]) for name in table if name != PRODUCT}


@lru_cache(maxsize=1)
def read_products() -> list[ProductConfiguration]:
    """Return the configurations of a head's own product."""
    return _read(ProductConfiguration, json.loads(TABLE.read_text(encoding="utf-8"))[PRODUCT])


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> int:
    """Return 10 * major + minor; for the interpreter, that of the oldest GPU."""
    if device.type != "cuda":
        return OLDEST
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def newest(entries: Sequence[E], capability: int) -> E:
    """Return the newest configuration not newer than the capability, else the oldest of all."""
    fitting = [entry for entry in entries if entry.from_capability <= capability]
    return (fitting or entries[-1:])[0]


def launch_options(kernel: str, num_columns: int, device: torch.device) -> dict[str, int]:
    """Return BLOCK and num_warps of a kernel for rows of `num_columns` on a device."""
    return newest(read_table()[kernel], _capability(device)).options(num_columns)


def product_configuration(element_bytes: int, device: torch.device) -> ProductConfiguration:
    """Return the configuration of a head's own product on a device."""
    entries = [entry for entry in read_products() if entry.element_bytes == element_bytes]
    return newest(entries, _capability(device))
