"""Compare the backends of each operation by bytes per second, beside a copy of as many bytes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.measure import device_name, measure
from benchmarks.passes import (
    SIZES,
    head_tile_passes,
    kl_tile_passes,
    logit_passes,
    sequence_passes,
)
from fastalign.ops.backends import unusable_reason


@dataclass(frozen=True)
class OperationRow:
    """One line of the table; the JSON file is a list of these."""

    case: str
    implementation: str
    dtype: str
    pass_: str
    milliseconds: float
    spread: float
    bytes_moved: int
    gigabytes_per_second: float
    copy_milliseconds: float
    fraction_of_copy: float
    device: str
    torch: str


def usable(backend: str, device: str, dtype: torch.dtype) -> bool:
    """Return whether to time a backend; Triton on a CPU would be its interpreter."""
    if backend == "torch":
        return True
    if (backend, device) == ("triton", "cpu"):
        return False
    return unusable_reason(backend, device, dtype) is None


def copy_of(device: str, num_bytes: int) -> Callable[[], object]:
    """Return a copy that reads and writes `num_bytes` in total."""
    source = torch.ones(max(num_bytes // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def compare_operations(device: str, dtype_name: str, num_rounds: int) -> list[OperationRow]:
    """Measure every pass; `dtype_name` is the dtype of logits and of the tile's gradient."""
    dtype = getattr(torch, dtype_name)
    rows: list[OperationRow] = []
    for make in (
        lambda: logit_passes(device, dtype),
        lambda: head_tile_passes(device, dtype),
        lambda: kl_tile_passes(device, dtype),
        lambda: sequence_passes(device),
    ):
        for one in make():
            names = [name for name in one.backends if usable(name, device, dtype)]
            calls = {name: (lambda name=name, one=one: one.run(backend=name)) for name in names}
            measured = measure(
                {**calls, "copy": copy_of(device, one.bytes_moved)}, device, num_rounds=num_rounds
            )
            copy_ms = measured.pop("copy").milliseconds
            rows += [
                OperationRow(
                    case="x".join(map(str, SIZES[device])),
                    implementation=name,
                    dtype=dtype_name,
                    pass_=one.name,
                    milliseconds=found.milliseconds,
                    spread=found.spread,
                    bytes_moved=one.bytes_moved,
                    gigabytes_per_second=one.bytes_moved / found.milliseconds / 1e6,
                    copy_milliseconds=copy_ms,
                    fraction_of_copy=copy_ms / found.milliseconds,
                    device=device_name(device),
                    torch=torch.__version__,
                )
                for name, found in measured.items()
            ]
    return rows


def print_operations(rows: list[OperationRow]) -> None:
    """Print the rows as a table."""
    print(
        f"{'pass':32}{'backend':12}{'dtype':10}{'ms':>10}{'spread':>8}{'GB/s':>9}{'of a copy':>11}"
    )
    for row in rows:
        print(
            f"{row.pass_:32}{row.implementation:12}{row.dtype:10}{row.milliseconds:10.3f}"
            f"{row.spread:8.0%}{row.gigabytes_per_second:9.1f}{row.fraction_of_copy:11.0%}"
        )
