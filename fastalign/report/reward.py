"""The report's section on reward models: table, calibration, accuracy by length."""

import math
from collections.abc import Sequence

from fastalign.report.pictures import as_data_uri, label, new_figure, plain
from fastalign.report.runs import RunRecord

REWARD_COLUMNS = (
    *("reward model", "accuracy", "the longer won", "the shorter won"),
    *("log-likelihood", "without ties", "calibration error"),
)
_BASELINES = (("longer_wins", "the longer wins"), ("bag_of_words", "a bag of words"))


def cell(measure: tuple[float, float] | None) -> str:
    """Return `0.868 ± 0.011`, or an empty cell."""
    return "" if measure is None else f"{measure[0]:.3f} ± {measure[1]:.3f}"


def reward_table(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Return the REWARD_COLUMNS of each evaluated reward model, with its baselines below it."""
    rows = []
    for run in runs:
        if run.measure("log_likelihood") is None:
            continue
        assert run.evaluation is not None
        names = ("accuracy", "accuracy_longer_won", "accuracy_shorter_won")
        likelihoods = ("log_likelihood", "log_likelihood_untied")
        cells = [cell(run.measure(name)) for name in (*names, *likelihoods)]
        rows.append((run.name, *cells, f"{float(run.evaluation['calibration_error']):.3f}"))
        for name, words in _BASELINES:
            accuracy = run.measure(f"{name}_accuracy")
            if accuracy is not None:
                blank = [""] * (len(REWARD_COLUMNS) - 2)
                rows.append((f"{run.name}: {words}", cell(accuracy), *blank))
    return rows


def reliability(runs: Sequence[RunRecord]) -> str | None:
    """Draw how often the expected winner won against its predicted probability, or return None."""
    found = [(run.name, run.evaluation.get("calibration_bins")) for run in runs if run.evaluation]
    if not any(bins for _, bins in found):
        return None
    figure, axes = new_figure(5.2, 4.0)
    axes.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1, linestyle="--")
    for name, bins in found:
        if bins:
            errors = [standard_error(b["accuracy"], b["count"]) for b in bins]
            axes.errorbar(
                [b["confidence"] for b in bins],
                [b["accuracy"] for b in bins],
                yerr=errors,
                fmt="o-",
                markersize=4,
                linewidth=1.2,
                capsize=2,
                label=plain(name),
            )
    label(figure, "probability of the expected winner", "share of pairs that it won")
    return as_data_uri(figure)


def accuracy_by_length(runs: Sequence[RunRecord]) -> str | None:
    """Draw accuracy by difference in length for pairs that the longer or the shorter one won."""
    found = [(run.name, run.evaluation.get("length_bins")) for run in runs if run.evaluation]
    if not any(bins for _, bins in found):
        return None
    figure, axes = new_figure(6.2, 4.0)
    for number, (name, bins) in enumerate(found):
        if not bins:
            continue
        for side, marker, style in (("longer", "^", "-"), ("shorter", "v", ":")):
            shown = [b for b in bins if b[f"count_{side}_won"]]
            accuracies = [b[f"accuracy_{side}_won"] for b in shown]
            counts = [b[f"count_{side}_won"] for b in shown]
            axes.errorbar(
                [(b["low"] + b["high"]) / 2 for b in shown],
                accuracies,
                yerr=[standard_error(a, n) for a, n in zip(accuracies, counts, strict=True)],
                fmt=marker + style,
                color=f"C{number}",
                markersize=5,
                linewidth=1.2,
                capsize=2,
                label=f"{plain(name)}, the {side} won",
            )
    axes.set_ylim(0, 1.03)
    return as_data_uri(label(figure, "difference of the responses' lengths (tokens)", "accuracy"))


def standard_error(share: float, count: int) -> float:
    """Return the standard error of a share of independent pairs."""
    return math.sqrt(share * (1 - share) / count)
