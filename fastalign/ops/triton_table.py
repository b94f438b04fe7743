"""How wide the blocks of each Triton kernel are: a table, measured beforehand, never in a run.

`triton_table.json` holds, for each kernel, configurations by the oldest compute capability (80 for
8.0) that they are for, and the GPU they were measured on; null where nobody has measured yet, and
the numbers are an estimate. `python -m benchmarks.tune` measures on the GPU that is there and
writes the table.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import triton

TABLE = Path(__file__).with_suffix(".json")
OLDEST = 80
# Rows shorter than this do not feed more than four warps.
FEW_COLUMNS = 2048


@dataclass(frozen=True)
class Configuration:
    """One kernel's widest block of columns, and the warps that share it."""

    from_capability: int
    block: int
    num_warps: int
    measured_on: str | None

    def options(self, num_columns: int) -> dict[str, int]:
        """The launch's BLOCK and num_warps for rows of `num_columns`."""
        block = min(self.block, triton.next_power_of_2(num_columns))
        return {"BLOCK": block, "num_warps": self.num_warps if block >= FEW_COLUMNS else 4}


@lru_cache(maxsize=1)
def read_table() -> dict[str, list[Configuration]]:
    """Each kernel's configurations, the newest capability first."""
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
    """10 * major + minor; of the interpreter, that of the oldest GPU."""
    if device.type != "cuda":
        return OLDEST
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def configuration(kernel: str, capability: int) -> Configuration:
    """The newest one that is not newer than the capability, or the oldest of all."""
    entries = read_table()[kernel]
    fitting = [entry for entry in entries if entry.from_capability <= capability]
    return (fitting or entries[-1:])[0]


def launch_options(kernel: str, num_columns: int, device: torch.device) -> dict[str, int]:
    """BLOCK and num_warps of a kernel for rows of `num_columns` on a device."""
    return configuration(kernel, _capability(device)).options(num_columns)
