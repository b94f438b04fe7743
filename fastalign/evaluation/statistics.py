"""Means with their standard errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error (sample standard deviation / sqrt(n)), and n."""

    mean: float
    standard_error: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("estimate: expected at least one value, got none")
    tensor = torch.tensor(values, dtype=torch.float64)
    count = len(values)
    error = tensor.std().item() / math.sqrt(count) if count > 1 else math.nan
    return Estimate(tensor.mean().item(), error, count)


def estimate_of_groups(groups: Sequence[Sequence[float]]) -> Estimate:
    """The mean of values that are independent between groups only (samples of one prompt)."""
    return estimate([math.fsum(group) / len(group) for group in groups])


def summary(name: str, value: Estimate) -> dict[str, float | int]:
    """`name`, `name_se` and `name_count`, as the JSON of an evaluation holds them."""
    return {name: value.mean, f"{name}_se": value.standard_error, f"{name}_count": value.count}
