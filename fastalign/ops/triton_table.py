"""Block widths and warps of each Triton kernel: a table measured beforehand, never in a run.

`triton_table.json` lists configurations of each kernel, each with the oldest compute capability
that it is for (80 for 8.0) and the GPU that it was measured on; null means an estimate. `python -m
benchmarks.tune` measures on the GPU of its machine and writes the table.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import triton

TABLE = Path(__file__).with_suffix(".json")
OLDEST = 80
# Blocks narrower than this have too little work for more than four warps.
FEW_COLUMNS = 2048


@dataclass(frozen=True)
class Configuration:
    """One kernel's widest block of columns, and the warps that share it."""

    from_capability: int
    block: int
    num_warps: int
    measured_on: str | None

    def options(self, num_columns: int) -> dict[str, int]:
        """Return BLOCK and num_warps of a launch for rows of `num_columns`."""
        block = min(self.block, triton.next_power_of_2(num_columns))
        return {"BLOCK": block, "num_warps": self.num_warps if block >= FEW_COLUMNS else 4}


@lru_cache(maxsize=1)
def read_table() -> dict[str, list[Configuration]]:
    """Return each kernel's configurations, the newest capability first."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        kernel: sorted(
            (Configuration(**entry) for entry in entries),
            key=lambda entry: entry.from_capability,
            reverse=True,
        )
        for kernel, entries in table.items()
    }


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> int:
    """Return 10 * major + minor; for the interpreter, that of the oldest GPU."""
    if device.type != "cuda":
        return OLDEST
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def configuration(kernel: str, capability: int) -> Configuration:
    """Return the newest configuration not newer than the capability, else the oldest of all."""
    entries = read_table()[kernel]
    fitting = [entry for entry in entries if entry.from_capability <= capability]
    return (fitting or entries[-1:])[0]


def launch_options(kernel: str, num_columns: int, device: torch.device) -> dict[str, int]:
    """Return BLOCK and num_warps of a kernel for rows of `num_columns` on a device."""
    return configuration(kernel, _capability(device)).options(num_columns)
