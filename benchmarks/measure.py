"""Time functions side by side: interleaved calls, median, spread and peak memory."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
# A function is not timed again after two calls that took this long in total.
ENOUGH_SECONDS = 20.0


@dataclass(frozen=True)
class Prepared:
    """A call whose preparation is not timed; `run` is, with the result of `prepare`."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]


@dataclass(frozen=True)
class Measurement:
    """One function's times over all rounds, and its peak memory.

    Attributes:
        milliseconds: median of the rounds.
        spread: (slowest - fastest) / median.
        peak_bytes: peak memory of one call beyond that before it: the CUDA allocator's, or on a CPU
            the resident size of the process; None if the system does not report it.
    """

    milliseconds: float
    spread: float
    peak_bytes: int | None


def device_name(device: str) -> str:
    """Return the GPU's name, or the processor's with the number of torch's threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"


def resident_bytes(field: str, process: Path = Path("/proc/self")) -> int:
    """Return `VmRSS` (now) or `VmHWM` (peak since the last reset) of a process on Linux."""
    for line in (process / "status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{process}/status has no {field}")


def peak_bytes(call: Prepared, device: str) -> int | None:
    """Return the peak memory of one call beyond that before it."""
    state = call.prepare()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call.run(state)
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    if not CLEAR_REFS.exists():
        call.run(state)
        return None
    CLEAR_REFS.write_text("5", encoding="ascii")  # resets the kernel's high-water mark
    before = resident_bytes("VmRSS")
    call.run(state)
    return resident_bytes("VmHWM") - before


def seconds(call: Prepared, device: str) -> float:
    """Return the wall-clock seconds of one call, synchronised before and after."""
    state = call.prepare()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call.run(state)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _unprepared(function: Callable[[], object]) -> Prepared:
    return Prepared(lambda: None, lambda _: function())


def measure(
    functions: Mapping[str, Callable[[], object] | Prepared], device: str, *, num_rounds: int
) -> dict[str, Measurement]:
    """Measure each function with one call per round, so that a busy machine affects all alike.

    Args:
        functions: calls without arguments, or prepared ones, by name.
        device: `cpu` or `cuda`.
        num_rounds: number of timed calls after one to warm up; fewer of a slow function.
    """
    calls = {
        name: function if isinstance(function, Prepared) else _unprepared(function)
        for name, function in functions.items()
    }
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for done in range(num_rounds):
        for name, call in calls.items():
            if done < 2 or sum(times[name]) < ENOUGH_SECONDS:
                times[name].append(seconds(call, device))
    return {
        name: Measurement(
            milliseconds=1e3 * statistics.median(values),
            spread=(max(values) - min(values)) / statistics.median(values),
            peak_bytes=peaks[name],
        )
        for name, values in times.items()
    }
