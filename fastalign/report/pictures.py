"""Draw the report's pictures as PNG data that a page can embed."""

import base64
import io
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from fastalign.output import shown
from fastalign.report.runs import RunRecord, best_of_rows

# Metrics to draw if a run has them, by heading: name and axis label.
SECTIONS = {
    "Training": {
        "loss": "loss",
        "rewards/margins": "implicit reward margin",
        "rewards/accuracies": "implicit reward accuracy",
        "entropy": "entropy (nats per token)",
        "grad_norm": "gradient norm",
        "tokens_per_second": "tokens per second",
        "peak_memory_bytes": "peak memory (bytes)",
    },
    "Reward models": {
        "accuracy": "accuracy of the scores",
        "margin": "margin of the scores",
        "mean_reward": "mean score",
    },
    "PPO": {
        "objective/scores": "score of the answers",
        "objective/rlhf_reward": "score minus the KL penalty",
        "objective/kl": "KL to the reference (nats per answer)",
        "objective/entropy": "entropy of the answers",
        "policy/entropy_avg": "entropy (nats per token)",
        "policy/approxkl_avg": "KL of an update",
        "policy/clipfrac_avg": "share of clipped ratios",
        "val/ratio": "mean ratio",
        "loss/policy_avg": "policy loss",
        "loss/value_avg": "value loss",
        "critic/explained_var": "variance explained by the critic",
        "completions/mean_length": "tokens per answer",
    },
}
NUM_BINS = 572  # columns of pixels in a curve's picture
KL_LABEL = "KL to the reference (nats per sequence)"


def check_pictures() -> None:
    """Raise ValueError if matplotlib, an extra, is not installed."""
    if find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib: pip install 'fastalign[report]'")


def as_data_uri(figure: Any) -> str:
    """Return the figure as `data:image/png;base64,...`."""
    stream = io.BytesIO()
    # Without the date and version that matplotlib adds, the same run gives the same bytes.
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure with one pair of axes, without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def label(figure: Any, x_label: str, y_label: str) -> Any:
    """Label a figure's axes and add its legend; return the figure."""
    (axes,) = figure.axes
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.legend(fontsize=8, frameon=False)
    return figure


def bar(error: float | None) -> float:
    """Return the length of an error bar, 0 for an unknown error."""
    return error if error is not None and math.isfinite(error) else 0.0


def plain(text: str) -> str:
    """Return text that matplotlib does not parse as mathematics, safe to show."""
    return shown(text).replace("$", r"\$")


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
    """Return the points to draw: of many in one column of pixels its extremes, and a gap if any."""
    if len(values) <= 4 * NUM_BINS:
        return steps, values
    found = np.asarray(values)
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), NUM_BINS):
        there = part[~np.isnan(found[part])]
        kept.update(part[np.isnan(found[part])][:1].tolist())
        if len(there):
            kept |= {int(there[found[there].argmin()]), int(there[found[there].argmax()])}
    places = sorted(kept)
    return [steps[place] for place in places], found[places].tolist()


def curve(runs: Sequence[RunRecord], name: str, axis: str) -> str | None:
    """Draw a metric of all runs that have it against the step, or return None without any.

    Held-out values are dashed. Below gradient norms, a cross marks each step that changed no
    weight, whose own norm may be NaN.
    """
    found = [(run, *run.series(name)) for run in runs]
    found = [entry for entry in found if entry[1]]
    if not found:
        return None
    figure, axes = new_figure(5.2, 3.2)
    for run, steps, values in found:
        (line,) = axes.plot(*thinned(steps, values), label=plain(run.name), linewidth=1.4)
        held_out_steps, held_out = run.series(f"eval_{name}")
        if held_out_steps:
            axes.plot(
                *thinned(held_out_steps, held_out),
                "o--",
                color=line.get_color(),
                markersize=4,
                linewidth=1,
            )
        if name == "grad_norm" and run.skipped_steps:
            axes.plot(
                run.skipped_steps,
                [0.0] * len(run.skipped_steps),
                "x",
                color=line.get_color(),
                label=f"{plain(run.name)}, skipped",
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )
    return as_data_uri(label(figure, "step", axis))


def reward_against_kl(runs: Sequence[RunRecord]) -> str | None:
    """Draw mean reward against KL to the reference with standard errors, or return None.

    The best of n of a run that is its own reference is a dashed line at the bound of its KL.
    """
    points = [(run.name, run.measure("kl"), run.measure("reward")) for run in runs]
    if not any(kl and reward for _, kl, reward in points):
        return None
    figure, axes = new_figure(6.2, 4.0)
    for name, kl, reward in points:
        if kl is None or reward is None:
            continue
        axes.errorbar(
            kl[0],
            reward[0],
            xerr=bar(kl[1]),
            yerr=bar(reward[1]),
            fmt="o",
            capsize=3,
            label=plain(name),
        )
    for run in runs:
        rows = best_of_rows(run.evaluation)
        if rows:
            places = [(row["kl_bound"], row["reward"]) for row in rows]
            name = f"{plain(run.name)}, best of {', '.join(str(row['n']) for row in rows)} (bound)"
            axes.plot(*zip(*places, strict=True), "x--", color="0.45", linewidth=1, label=name)
    return as_data_uri(label(figure, KL_LABEL, "mean reward"))
