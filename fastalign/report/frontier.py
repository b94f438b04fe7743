"""Reward against KL over many runs: gathered by method and strength, averaged over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastalign.evaluation.statistics import estimate

Strength = float | str | None


@dataclass(frozen=True)
class FrontierRun:
    """One evaluated run.

    Attributes:
        source: the file or folder it was read from.
        method: which curve it belongs to.
        strength: its place on the curve (beta, a KL coefficient, n); None: the method has none.
        seed: of the run, if it is known.
        reward: mean and standard error over prompts; None: it was not measured, or not finite.
        kl: likewise, to the reference.
        kl_is_bound: the KL is the bound of the best of n.
        collapsed: the run said so.
    """

    source: str
    method: str
    strength: Strength
    seed: int | None
    reward: tuple[float, float] | None
    kl: tuple[float, float] | None
    kl_is_bound: bool
    collapsed: bool


@dataclass(frozen=True)
class FrontierPoint:
    """The runs of one method and strength.

    `reward` and `kl` are means over the measured runs, collapsed ones among them; the standard
    errors are over runs, or over prompts (`error_over`) where one run was measured.
    """

    method: str
    strength: Strength
    reward: float | None
    reward_se: float | None
    kl: float | None
    kl_se: float | None
    kl_is_bound: bool
    error_over: str | None
    num_runs: int
    num_measured: int
    num_collapsed: int
    collapse_rate: float


def frontier_points(runs: Sequence[FrontierRun]) -> list[FrontierPoint]:
    """A point a method and strength, averaged over seeds; methods as they came, strengths rise."""
    gathered: dict[str, dict[Strength, list[FrontierRun]]] = {}
    for run in runs:
        gathered.setdefault(run.method, {}).setdefault(run.strength, []).append(run)
    return [
        average(by_strength[strength])
        for by_strength in gathered.values()
        for strength in sorted(by_strength, key=in_order)
    ]


def in_order(strength: Strength) -> tuple[int, float, str]:
    """Numbers by size, then words, then none."""
    if isinstance(strength, float):
        return 0, strength, ""
    return (1, 0.0, strength) if strength is not None else (2, 0.0, "")


def average(runs: Sequence[FrontierRun]) -> FrontierPoint:
    """The point of runs that differ in their seed only."""
    means: dict[str, float | None] = {}
    found = [(run.reward, run.kl) for run in runs if run.reward is not None and run.kl is not None]
    for place, name in enumerate(("reward", "kl")):
        values = [pair[place] for pair in found]
        over_runs = estimate([mean for mean, _ in values]) if values else None
        error = None if over_runs is None else over_runs.standard_error
        if len(values) == 1:
            error = values[0][1]
        means[name] = None if over_runs is None else over_runs.mean
        means[f"{name}_se"] = error if error is not None and math.isfinite(error) else None
    is_bound = any(run.kl_is_bound for run in runs)
    num_collapsed = sum(run.collapsed for run in runs)
    return FrontierPoint(
        method=runs[0].method,
        strength=runs[0].strength,
        reward=means["reward"],
        reward_se=means["reward_se"],
        kl=means["kl"],
        kl_se=None if is_bound else means["kl_se"],  # a bound is no measurement
        kl_is_bound=is_bound,
        error_over={0: None, 1: "prompts"}.get(len(found), "runs"),
        num_runs=len(runs),
        num_measured=len(found),
        num_collapsed=num_collapsed,
        collapse_rate=num_collapsed / len(runs),
    )
