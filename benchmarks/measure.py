"""Time functions side by side: interleaved calls, median, spread and peak memory.

A GPU's work is timed by the GPU, between CUDA events; a CPU's by the clock.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
# A function is not timed again after these rounds and this many seconds in total.
FEWEST_ROUNDS = 5
ENOUGH_SECONDS = 20.0
# A GPU function shorter than this is repeated for as long in every round, at most so many times.
ROUND_SECONDS = 0.02
MAX_REPEATS = 100
FLUSHED_BYTES = 256 * 2**20  # more than the L2 cache of any GPU here


# Settings of glibc's allocator, by name. By default it returns large blocks to the system after
# each use, and the next use pays for their pages again; `keep` does not, roughly as jemalloc and
# tcmalloc do not.
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "keep": {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"},
}


def allocator_name() -> str:
    """Return the name of the allocator's settings that this process was started with."""
    kept = ALLOCATORS["keep"].items()
    return "keep" if all(os.environ.get(name) == value for name, value in kept) else "default"


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


def cpu_seconds(call: Prepared) -> float:
    """Return the wall-clock seconds of one call."""
    state = call.prepare()
    start = time.perf_counter()
    call.run(state)
    return time.perf_counter() - start


class GpuTimer:
    """Times calls by CUDA events: the seconds of the GPU alone, a mean over repeats.

    Before each call the GPU overwrites a buffer that is larger than its L2 cache. So a call never
    finds its inputs in the cache, and is launched while the GPU is still busy: a short call would
    otherwise be as long as its launch by the host.
    """

    def __init__(self, flushed: torch.Tensor) -> None:
        self._flushed = flushed
        self._repeats: dict[Prepared, int] = {}

    def __call__(self, call: Prepared) -> float:
        """Return the mean seconds of the repeats of a round."""
        if call not in self._repeats:
            one = self._mean(call, 1)
            self._repeats[call] = min(max(round(ROUND_SECONDS / one), 1), MAX_REPEATS)
        return self._mean(call, self._repeats[call])

    def _mean(self, call: Prepared, repeats: int) -> float:
        events = []
        for _ in range(repeats):
            state = call.prepare()
            self._flushed.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call.run(state)
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return 1e-3 * statistics.fmean(start.elapsed_time(end) for start, end in events)


def timer_of(device: str) -> Callable[[Prepared], float]:
    """Return the function that times one call on a device."""
    if device != "cuda":
        return cpu_seconds
    return GpuTimer(torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda"))


def _unprepared(function: Callable[[], object]) -> Prepared:
    return Prepared(lambda: None, lambda _: function())


def measure(
    functions: Mapping[str, Callable[[], object] | Prepared],
    device: str,
    *,
    num_rounds: int,
    timer: Callable[[Prepared], float] | None = None,
) -> dict[str, Measurement]:
    """Measure each function once per round, so that a busy machine affects all alike.

    Args:
        functions: calls without arguments, or prepared ones, by name.
        device: `cpu` or `cuda`.
        num_rounds: number of timed rounds after a call to warm up; fewer of a slow function.
        timer: function that returns the seconds of a call; by default that of the device.
    """
    calls = {
        name: function if isinstance(function, Prepared) else _unprepared(function)
        for name, function in functions.items()
    }
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    seconds = timer or timer_of(device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for done in range(num_rounds):
        for name, call in calls.items():
            if done < FEWEST_ROUNDS or sum(times[name]) < ENOUGH_SECONDS:
                times[name].append(seconds(call))
    return {
        name: Measurement(
            milliseconds=1e3 * statistics.median(values),
            spread=(max(values) - min(values)) / statistics.median(values),
            peak_bytes=peaks[name],
        )
        for name, values in times.items()
    }
