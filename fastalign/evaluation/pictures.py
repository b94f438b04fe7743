"""The report's pictures, as PNG data that a page can hold in itself."""

import base64
import io
from collections.abc import Sequence
from typing import Any

from fastalign.evaluation.runs import RunRecord

# Metrics that are drawn where a run has them: (name, label of the axis).
CURVES = (
    ("loss", "loss"),
    ("rewards/margins", "implicit reward margin"),
    ("rewards/accuracies", "implicit reward accuracy"),
    ("reward", "reward of the samples"),
    ("objective/kl", "KL to the reference (nats a sequence)"),
    ("entropy", "entropy (nats a token)"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "tokens a second"),
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


def plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")


def curve(runs: Sequence[RunRecord], name: str, label: str) -> str | None:
    """A metric of all runs that have it against the step, the held-out value dashed; or None."""
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
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.legend(fontsize=8, frameon=False)
    return as_data_uri(figure)


def reward_against_kl(runs: Sequence[RunRecord]) -> str | None:
    """Mean reward against KL to the reference, with one standard error each way; or None."""
    points = [(run.name, run.measure("kl"), run.measure("reward")) for run in runs]
    if not any(kl and reward for _, kl, reward in points):
        return None
    figure, axes = new_figure(6.2, 4.0)
    for name, kl, reward in points:
        if kl is None or reward is None:
            continue
        axes.errorbar(
            kl[0], reward[0], xerr=kl[1], yerr=reward[1], fmt="o", capsize=3, label=plain(name)
        )
    axes.set_xlabel("KL to the reference (nats a sequence)")
    axes.set_ylabel("mean reward")
    axes.legend(fontsize=8, frameon=False)
    return as_data_uri(figure)
