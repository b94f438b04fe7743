"""Counts the matrix products and the memory of a call, by the profiler's raw events."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


def recorded(call: Callable[[], object]) -> list[Any]:
    """What the profiler saw inside `call`, inner parts of our own operations included."""
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True
    ) as seen:
        call()
    return sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())


def matrix_product_flops(call: Callable[[], object]) -> int:
    """FLOPs of the matrix products in `call`."""
    total = 0
    for event in recorded(call):
        if event.name() in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = event.shapes()[event.name() != "aten::mm" :][:2]
            total += 2 * left[0] * left[1] * right[1]
        assert "bmm" not in event.name()
        assert "einsum" not in event.name()
    return total


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that `call` held at one time, beyond what was held before."""
    sizes = [event.nbytes() for event in recorded(call) if event.name() == "[memory]"]
    return max(accumulate(sizes), default=0)
