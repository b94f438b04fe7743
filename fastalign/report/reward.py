"""The report's section on reward models: table, calibration, accuracy by length."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from fastalign.report.metric_table import Row
from fastalign.report.pictures import Curve, Legend, Point, figure, scatter
from fastalign.report.runs import RunRecord
from fastalign.report.svg import run_class

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


def calibration(runs: Sequence[RunRecord]) -> tuple[list[Point], list[Curve]]:
    """Return how often the expected winner won against its predicted probability."""
    points, curves = [], []
    for place, run in enumerate(runs):
        bins = (run.evaluation or {}).get("calibration_bins")
        if bins:
            css, xs, ys = run_class(place), [b["confidence"] for b in bins], accuracies(bins)
            curves.append(Curve(xs, ys, css))
            points += [
                Point(
                    *(
                        x,
                        y,
                        css,
                        f"{run.name}: expected {x:.2f}, won {y:.2f} of {b['count']} pairs",
                    ),
                    errors=(0.0, standard_error(y, b["count"])),
                )
                for x, y, b in zip(xs, ys, bins, strict=True)
            ]
    return points, curves


def accuracies(bins: Sequence[Row], suffix: str = "") -> list[float]:
    """Return the accuracy of each bin."""
    return [b[f"accuracy{suffix}"] for b in bins]


def reliability(runs: Sequence[RunRecord]) -> Markup | None:
    """Draw how often the expected winner won against its predicted probability, or return None."""
    points, curves = calibration(runs)
    if not points:
        return None
    ideal = Curve([0.5, 1.0], [0.5, 1.0], "plain", dashed=True)
    axes = "probability of the expected winner", "share of pairs that it won"
    label = "Share of pairs that the expected winner won, against its probability"
    plot = scatter(points, [ideal, *curves], axes, label, (520, 400))
    return figure(plot, run_legend(runs, curves, "circle"))


def run_legend(runs: Sequence[RunRecord], curves: Sequence[Curve], shape: str) -> Legend:
    """Return the runs that curves belong to."""
    drawn = {curve.css for curve in curves}
    classes = {run_class(place): run.name for place, run in enumerate(runs)}
    return [(css, shape, name) for css, name in classes.items() if css in drawn]


def by_length(runs: Sequence[RunRecord]) -> tuple[list[Point], list[Curve]]:
    """Return accuracy by difference in length, where the longer and where the shorter one won."""
    points, curves = [], []
    for place, run in enumerate(runs):
        bins: list[Row] = (run.evaluation or {}).get("length_bins") or []
        for side, shape in (("longer", "triangle"), ("shorter", "down")) if bins else ():
            there = [b for b in bins if b[f"count_{side}_won"]]
            xs = [(b["low"] + b["high"]) / 2 for b in there]
            ys = accuracies(there, f"_{side}_won")
            css = run_class(place)
            curves.append(Curve(xs, ys, css, dashed=side == "shorter"))
            for x, y, b in zip(xs, ys, there, strict=True):
                count = b[f"count_{side}_won"]
                tip = f"{run.name}: {b['low']} to {b['high']} tokens apart, the {side} won"
                tip += f": right on {y:.1%} of {count}"
                error = standard_error(y, count)
                points.append(Point(x, y, css, tip, errors=(0.0, error), shape=shape))
    return points, curves


def accuracy_by_length(runs: Sequence[RunRecord]) -> Markup | None:
    """Draw accuracy by difference in length for pairs that the longer or the shorter one won."""
    points, curves = by_length(runs)
    if not points:
        return None
    axes = "difference of the responses' lengths (tokens)", "accuracy"
    label = "Accuracy against the difference of lengths, where the longer and the shorter one won"
    legend = [
        *run_legend(runs, curves, "circle"),
        ("plain", "triangle", "the longer won"),
        ("plain", "down", "the shorter won (dashed)"),
    ]
    return figure(scatter(points, curves, axes, label, (520, 400)), legend)


def standard_error(share: float, count: int) -> float:
    """Return the standard error of a share of independent pairs."""
    return math.sqrt(share * (1 - share) / count)
