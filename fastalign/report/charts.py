"""The report's charts: which metrics of which runs stand in one picture, and their points."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fastalign.output import shown
from fastalign.report.runs import RunRecord, is_set, labels_of


class Metric(NamedTuple):
    """A metric's name in words, its unit, and the factor that turns its values into that unit."""

    title: str
    unit: str = ""
    factor: float = 1.0


# In the order of a section; a section has those that its runs logged.
METRICS = {
    "reward": Metric("Reward of the answers"),
    "objective/scores": Metric("Score of the answers"),
    "objective/rlhf_reward": Metric("Score less the KL penalty"),
    "objective/kl": Metric("KL to the reference", "nats per answer"),
    "loss": Metric("Loss"),
    "rewards/accuracies": Metric("Accuracy of the implicit reward", "share of pairs"),
    "rewards/margins": Metric("Margin of the implicit reward"),
    "kl": Metric("KL to the reference by mismatched answers", "nats per answer"),
    "logps/chosen": Metric("Log-prob of chosen responses", "nats"),
    "logps/rejected": Metric("Log-prob of rejected responses", "nats"),
    "accuracy": Metric("Accuracy of the scores", "share of pairs"),
    "margin": Metric("Margin of the scores"),
    "mean_reward": Metric("Mean score"),
    "jsd": Metric("Divergence from the teacher", "nats per token"),
    "mean_token_accuracy": Metric("Accuracy of the next token", "share of tokens"),
    "entropy": Metric("Entropy", "nats per token"),
    "objective/entropy": Metric("Entropy of the answers", "nats per answer"),
    "policy/entropy_avg": Metric("Entropy in the updates", "nats per token"),
    "completions/mean_length": Metric("Length of the answers", "tokens"),
    "completions/clipped_ratio": Metric("Answers without an end", "share"),
    "completions/repeated_ratio": Metric("Repeated parts of the answers", "share"),
    "policy/approxkl_avg": Metric("KL of an update", "nats per token"),
    "policy/clipfrac_avg": Metric("Clipped ratios", "share of tokens"),
    "val/ratio": Metric("Mean ratio to the sampling policy"),
    "loss/policy_avg": Metric("Policy loss"),
    "loss/value_avg": Metric("Value loss"),
    "critic/explained_var": Metric("Variance explained by the value model", "share"),
    "grad_norm": Metric("Gradient norm"),
    "learning_rate": Metric("Learning rate"),
    "lr": Metric("Learning rate"),
    "step_seconds": Metric("Time of a step", "s"),
    "tokens_per_second": Metric("Speed", "tokens per second"),
    "peak_memory_bytes": Metric("Peak memory", "GiB", 2.0**-30),
}
HELD_OUT = "eval_"
MOST_BINS, LEAST_BINS = 500, 60
MOST_POINTS = 60_000  # of a page's curves, about 12 bytes each


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        run: place of its run among the report's, which gives its colour.
        name: name of the run.
        xs: steps, rising.
        ys: values at them; NaN is a gap.
        means: steps and mean values of the parts of a curve that was thinned to their extremes.
        held_out: whether the data are held out.
    """

    run: int
    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    means: tuple[Sequence[float], Sequence[float]] | None = None
    held_out: bool = False


class Mark(NamedTuple):
    """Something that happened to a run at a step, in words."""

    run: int
    step: int
    words: str
    kind: str  # `collapse` or `skipped`


@dataclass(frozen=True)
class Chart:
    """Curves of one metric over the steps of runs of one algorithm."""

    key: str
    title: str
    unit: str
    lines: list[Line]
    marks: list[Mark] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """The charts of one algorithm's runs."""

    title: str
    runs: list[int]
    charts: list[Chart]


def algorithm(run: RunRecord) -> str:
    """Return the heading under which a run's curves stand; steps of others mean other things."""
    if "ppo" in run.config:
        return "Policy gradient (PPO, GRPO, RLOO)"
    if run.metrics.logged("mean_reward"):
        return "Reward models"
    if "pairs" in run.config:
        return "Online preference learning"
    titles = {"sft": "Fine-tuning (SFT)", "kto": "Answers found good or bad (KTO)"}
    return titles.get(labels_of(run)[0], "Preference learning (DPO)")


def sections(runs: Sequence[RunRecord]) -> list[Section]:
    """Return the charts of each algorithm, in the order in which the runs have them."""
    groups: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        groups.setdefault(algorithm(run), []).append(place)
    found = {
        (title, name): [place for place in places if runs[place].metrics.numbers(name)[0].any()]
        for title, places in groups.items()
        for name in METRICS
    }
    num_lines = 2 * sum(map(len, found.values())) or 1
    bins = max(LEAST_BINS, min(MOST_BINS, MOST_POINTS // (3 * num_lines)))
    return [
        Section(
            title,
            places,
            [chart(runs, found[title, name], name, bins) for name in METRICS if found[title, name]],
        )
        for title, places in groups.items()
        if any(found[title, name] for name in METRICS)
    ]


def chart(runs: Sequence[RunRecord], places: Iterable[int], name: str, bins: int) -> Chart:
    """Return the chart of a metric of some runs: the curves, and what happened to the runs."""
    metric, lines, marks = METRICS[name], [], []
    for place in places:
        run = runs[place]
        for prefix in ("", HELD_OUT):
            steps, values = run.metrics.arrays(f"{prefix}{name}")
            if len(steps):
                points = thinned(steps, values * metric.factor, bins)
                lines.append(Line(place, run.name, *points, prefix == HELD_OUT))
        if name == "grad_norm":
            words = "this step changed no weight"
            skipped = run.skipped_steps
            kept = skipped[:: max(1, len(skipped) // bins)]
            marks += [Mark(place, step, words, "skipped") for step in kept]
        marks += [Mark(place, *collapse, "collapse") for collapse in collapses(run)]
    return Chart(name, metric.title, metric.unit, lines, marks)


def collapses(run: RunRecord) -> list[tuple[int, str]]:
    """Return the steps at which a run's policy began to look collapsed, and what was logged."""
    found: list[tuple[int, str]] = []
    before = False
    has_step = run.metrics.has("step")
    for place in np.flatnonzero(run.metrics.has("collapsed") & has_step).tolist():
        row = run.metrics[place]
        now = is_set(row["collapsed"])
        if now and not before:
            words = f": {row['collapsed']}" if isinstance(row["collapsed"], str) else ""
            found.append((row["step"], f"the policy looks collapsed{words}"))
        before = now
    return found


def thinned(
    steps: np.ndarray, values: np.ndarray, bins: int
) -> tuple[list[float], list[float], tuple[list[float], list[float]] | None]:
    """Return the points to draw, and the means of the parts of a long curve.

    Of many points in one column of pixels these are its extremes, and a gap if there is any.
    """
    if len(values) <= 4 * bins:
        return steps.tolist(), values.tolist(), None
    kept = {0, len(values) - 1}
    places, means = [], []
    for part in np.array_split(np.arange(len(values)), bins):
        finite = part[np.isfinite(values[part])]
        kept.update(part[np.isnan(values[part])][:1].tolist())
        if len(finite):
            kept |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
            places.append(int(finite[len(finite) // 2]))
            means.append(float(values[finite].mean()))
    drawn = sorted(kept)
    return steps[drawn].tolist(), values[drawn].tolist(), (steps[places].tolist(), means)


def as_json(runs: Sequence[RunRecord], found: Sequence[Section]) -> dict[str, Any]:
    """Return the charts as the page's script reads them; numbers have five digits."""
    return {
        "runs": [shown(run.name) for run in runs],
        "charts": {
            f"{number}/{chart.key}": {
                "section": number,
                "unit": chart.unit,
                "lines": [line_as_json(line) for line in chart.lines],
                "marks": [[m.run, m.step, shown(m.words), m.kind] for m in chart.marks],
            }
            for number, section in enumerate(found)
            for chart in section.charts
        },
    }


def line_as_json(line: Line) -> dict[str, Any]:
    """Return a curve; steps that rise evenly are their first and their distance."""
    found: dict[str, Any] = {
        "run": line.run,
        "heldOut": line.held_out,
        "x": short_steps(line.xs),
        "y": [short(y) for y in line.ys],
    }
    if line.means is not None:
        found["means"] = [short_steps(line.means[0]), [short(y) for y in line.means[1]]]
    return found


def short_steps(steps: Sequence[float]) -> Any:
    """Return `{"first": 10, "by": 10}` for steps that rise evenly, else the steps."""
    by = steps[1] - steps[0] if len(steps) > 1 else 1
    if all(step == steps[0] + by * place for place, step in enumerate(steps)):
        return {"first": steps[0], "by": by}
    return list(steps)


def short(value: float) -> float | int | None:
    """Return a number with five digits; None for one that JSON lacks."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.5g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
