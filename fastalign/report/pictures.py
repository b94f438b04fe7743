"""The report's pictures, as PNG data that a page can hold in itself."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

from fastalign.report.runs import RunRecord, best_of_rows

# Metrics that are drawn where a run has them: heading, and (name, label of the axis) below it.
SECTIONS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Training",
        (
            ("loss", "loss"),
            ("rewards/margins", "implicit reward margin"),
            ("rewards/accuracies", "implicit reward accuracy"),
            ("entropy", "entropy (nats a token)"),
            ("grad_norm", "gradient norm"),
            ("tokens_per_second", "tokens a second"),
            ("peak_memory_bytes", "peak memory (bytes)"),
        ),
    ),
    (
        "Reward models",
        (
            ("accuracy", "accuracy of the scores"),
            ("margin", "margin of the scores"),
            ("mean_reward", "mean score"),
        ),
    ),
    (
        "PPO",
        (
            ("objective/scores", "score of the answers"),
            ("objective/rlhf_reward", "score less the KL's penalty"),
            ("objective/kl", "KL to the reference (nats an answer)"),
            ("objective/entropy", "entropy of the answers"),
            ("policy/entropy_avg", "entropy (nats a token)"),
            ("policy/approxkl_avg", "KL of an update"),
            ("policy/clipfrac_avg", "share of clipped ratios"),
            ("val/ratio", "mean ratio"),
            ("loss/policy_avg", "policy loss"),
            ("loss/value_avg", "value loss"),
            ("critic/explained_var", "variance that the critic explains"),
            ("completions/mean_length", "tokens of an answer"),
        ),
    ),
)


def as_data_uri(figure: Any) -> str:
    """The figure as `data:image/png;base64,...`."""
    stream = io.BytesIO()
    # Without the date and version that matplotlib adds, the same run gives the same bytes.
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure with one pair of axes, without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def bar(error: float | None) -> float:
    """The length of an error bar; of an unknown error, none."""
    return error if error is not None and math.isfinite(error) else 0.0


def plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")


def curve(runs: Sequence[RunRecord], name: str, label: str) -> str | None:
    """A metric of all runs that have it against the step, the held-out value dashed; or None.

    Under gradient norms a cross marks each step that changed no weight, whose own norm may be NaN.
    """
    found = [(run, *run.series(name)) for run in runs]
    found = [entry for entry in found if entry[1]]
    if not found:
        return None
    figure, axes = new_figure(5.2, 3.2)
    for run, steps, values in found:
        (line,) = axes.plot(steps, values, label=plain(run.name), linewidth=1.4)
        held_out_steps, held_out = run.series(f"eval_{name}")
        if held_out_steps:
            axes.plot(
                held_out_steps, held_out, "o--", color=line.get_color(), markersize=4, linewidth=1
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
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.legend(fontsize=8, frameon=False)
    return as_data_uri(figure)


def reward_against_kl(runs: Sequence[RunRecord]) -> str | None:
    """Mean reward against KL to the reference, with one standard error each way; or None.

    The best of n of a run that is its own reference is a dashed line, its KL the bound.
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
            label = f"{plain(run.name)}, best of {', '.join(str(row['n']) for row in rows)} (bound)"
            axes.plot(*zip(*places, strict=True), "x--", color="0.45", linewidth=1, label=label)
    axes.set_xlabel("KL to the reference (nats a sequence)")
    axes.set_ylabel("mean reward")
    axes.legend(fontsize=8, frameon=False)
    return as_data_uri(figure)
