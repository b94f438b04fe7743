"""Means with their standard errors, and shares with their confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

NORMAL_QUANTILE = 1.959963984540054  # 97.5 % of a normal variable lies below


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error (sample standard deviation / sqrt(n)), and n."""

    mean: float
    standard_error: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate the mean of independent values; raise ValueError if there are none."""
    if not values:
        raise ValueError("estimate: expected at least one value, got none")
    tensor = torch.tensor(values, dtype=torch.float64)
    count = len(values)
    error = tensor.std().item() / math.sqrt(count) if count > 1 else math.nan
    return Estimate(tensor.mean().item(), error, count)


def estimate_of_groups(groups: Sequence[Sequence[float]]) -> Estimate:
    """Estimate the mean of values that are independent between groups only (prompts)."""
    return estimate([math.fsum(group) / len(group) for group in groups])


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval, and the method it was computed by."""

    low: float
    high: float
    method: str


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the score interval (Wilson 1927) of a share of `count` independent cases.

    It lies within [0, 1]. Cases that count one half make it a little too wide, never too narrow.
    """
    spread = NORMAL_QUANTILE**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    groups: Sequence[Sequence[float]], *, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean, resampling whole groups."""
    sums = torch.tensor([math.fsum(group) for group in groups], dtype=torch.float64)
    counts = torch.tensor([len(group) for group in groups], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means, at_once = [], max(1, 2**22 // len(groups))  # resamples that fit 32 MiB of indices
    for start in range(0, num_resamples, at_once):
        rows = min(at_once, num_resamples - start)
        drawn = torch.randint(len(groups), (rows, len(groups)), generator=generator)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.cat(means).quantile(tails).tolist()
    return low, high


def share_interval(groups: Sequence[Sequence[float]]) -> Interval:
    """Return the interval of a mean of values in [0, 1] that are independent between groups only.

    With one value per group it is Wilson's. With several, groups (prompts) are resampled; if all
    groups have the same mean, which resampling would take for no spread at all, it is Wilson's with
    each group as one case.

    Raises:
        ValueError: if there are no values.
    """
    filled = [group for group in groups if group]
    if not filled:
        raise ValueError("interval: expected at least one value, got none")
    means = [math.fsum(group) / len(group) for group in filled]
    if max(len(group) for group in filled) == 1:
        return Interval(*wilson_interval(math.fsum(means) / len(means), len(means)), "wilson")
    if max(means) - min(means) < 1e-12:
        return Interval(*wilson_interval(means[0], len(means)), "wilson over prompts")
    return Interval(*bootstrap_interval(filled), "bootstrap over prompts")


def summary(name: str, value: Estimate) -> dict[str, float | int]:
    """Return `name`, `name_se` and `name_count`, as in the JSON of an evaluation."""
    return {name: value.mean, f"{name}_se": value.standard_error, f"{name}_count": value.count}
