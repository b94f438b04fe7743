"""Sums over segments of packed rows, for example the tokens of each response."""

import torch
from torch import Tensor


def segment_sum(values: Tensor, bounds: Tensor) -> Tensor:
    """Return the sum of values[bounds[r] : bounds[r + 1]] for each segment r, (R,).

    Sums are accumulated in float64 and rounded once: in float32 the log-prob of a 4,000-token
    response would be off by thousandths of a nat. Differentiable and deterministic.

    Args:
        values: floating tensor (N,).
        bounds: integers (R + 1,) that do not fall, from 0 to N, on the device of `values`.

    Returns:
        (R,) in the dtype of `values`; 0 for an empty segment.

    Raises:
        ValueError: if a shape or dtype is wrong or, on a CPU, bounds do not rise from 0 to N.
    """
    if values.ndim != 1 or not values.is_floating_point():
        raise ValueError(
            f"values: expected floating (N,), got {values.dtype} {tuple(values.shape)}"
        )
    check_bounds(bounds, values.shape[0])
    sums = torch.segment_reduce(
        values.double(), "sum", offsets=bounds.long(), axis=0, unsafe=True, initial=0
    )
    return sums.to(values.dtype)


def check_bounds(bounds: Tensor, num_rows: int) -> None:
    """Check the bounds of segments: their shape and dtype; on a CPU, also their values.

    Raises:
        ValueError: if they are not integers (R + 1,), or do not rise from 0 to `num_rows`.
    """
    if not isinstance(bounds, Tensor):
        raise ValueError(f"bounds: expected a tensor (R + 1,), got {type(bounds).__name__}")
    if bounds.ndim != 1 or bounds.numel() == 0 or bounds.is_floating_point():
        raise ValueError(
            f"bounds: expected integers (R + 1,), got {bounds.dtype} {tuple(bounds.shape)}"
        )
    if bounds.device.type != "cpu" or torch.compiler.is_compiling():
        return
    first, last = int(bounds[0]), int(bounds[-1])
    if (first, last) != (0, num_rows):
        raise ValueError(f"bounds: expected to rise from 0 to {num_rows}, got {first}..{last}")
    falling = (bounds.diff() < 0).nonzero()
    if falling.numel():
        place = int(falling[0])
        raise ValueError(
            f"bounds: expected to rise from 0 to {num_rows}, "
            f"got {int(bounds[place])}, {int(bounds[place + 1])} at segment {place}"
        )
