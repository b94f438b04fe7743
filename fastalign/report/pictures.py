"""Draw the report's pictures that are no curves over steps, with their legends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from fastalign.output import shown
from fastalign.report.charts import Chart
from fastalign.report.runs import RunRecord, best_of_rows
from fastalign.report.summary import training, with_error
from fastalign.report.svg import (
    CHARACTER,
    MARKS,
    Axis,
    Plot,
    place_labels,
    run_attribute,
    run_class,
    span,
)

KL_LABEL = "KL to the reference (nats per answer)"
Legend = Sequence[tuple[str, str, str]]
"""Class, shape (a mark's, `line` or `dashed`) and words of each entry."""


@dataclass(frozen=True)
class Point:
    """A mark of a scatter plot.

    Attributes:
        x: its place on the horizontal axis.
        y: its place on the vertical axis.
        css: class that gives its colour.
        tip: words that are shown on hover.
        label: words beside it.
        errors: half the lengths of its error bars.
        shape: its shape.
        hollow: whether it is drawn as an outline.
    """

    x: float
    y: float
    css: str
    tip: str
    label: str = ""
    errors: tuple[float, float] = (0.0, 0.0)
    shape: str = "circle"
    hollow: bool = False


@dataclass(frozen=True)
class Curve:
    """A line through points: coordinates, class, and whether it is dashed."""

    xs: Sequence[float]
    ys: Sequence[float]
    css: str
    dashed: bool = False


def figure(plot: Plot, legend: Legend = ()) -> Markup:
    """Return a picture with its legend."""
    entries = "".join(
        f'<li class="{css}"{run_attribute(css)}>{sample(shape)} {escape(shown(words))}</li>'
        for css, shape, words in legend
    )
    below = f'<ul class="legend">{entries}</ul>' if entries else ""
    return Markup(f'<figure class="picture">{plot.svg()}{below}</figure>')


def sample(shape: str) -> str:
    """Return the small picture of a legend's entry."""
    if shape in MARKS:
        inside = MARKS[shape](9, 7)
    else:
        dashed = " dashed" if shape == "dashed" else ""
        inside = f'<path class="line{dashed}" d="M0 7H18"/>'
    return f'<svg class="sample mark" viewBox="0 0 18 14" aria-hidden="true">{inside}</svg>'


def scatter(
    points: Sequence[Point],
    curves: Sequence[Curve],
    axes: tuple[str, str],
    label: str,
    size: tuple[int, int] = (640, 400),
) -> Plot:
    """Return marks with error bars and labels that do not cover one another, over curves."""
    xs = [p.x + side * p.errors[0] for p in points for side in (-1, 1)]
    ys = [p.y + side * p.errors[1] for p in points for side in (-1, 1)]
    xs += [x for curve in curves for x in curve.xs]
    ys += [y for curve in curves for y in curve.ys]
    plot = Plot(size, Axis(*span(xs, 0.08), axes[0]), Axis(*span(ys, 0.08), axes[1]), label)
    for curve in curves:
        plot.line(curve.xs, curve.ys, curve.css, dashed=curve.dashed)
    for point in points:
        plot.point(
            *(point.x, point.y, point.css, point.tip),
            errors=point.errors,
            shape=point.shape,
            hollow=point.hollow,
        )
    corners = place_labels(
        [plot.at(point.x, point.y) for point in points],
        [len(point.label) * CHARACTER for point in points],
        plot.inside,
        obstacles=[box for point in points for box in _error_boxes(plot, point)],
    )
    for point, (left, bottom) in zip(points, corners, strict=True):
        if point.label:
            more = run_attribute(point.css)
            plot.text(left, bottom - 2, point.label, f"label {point.css}", more)
    return plot


def _error_boxes(plot: Plot, point: Point) -> list[tuple[float, float, float, float]]:
    (x, y), (along, up) = plot.at(point.x, point.y), point.errors
    right, top = plot.at(point.x + along, point.y + up)
    wide, tall = right - x, y - top
    return [(x - wide, y - 2, x + wide, y + 2), (x - 2, y - tall, x + 2, y + tall)]


def bar(error: float | None) -> float:
    """Return the length of an error bar, 0 for an unknown error."""
    return error if error is not None and math.isfinite(error) else 0.0


def reward_against_kl(runs: Sequence[RunRecord]) -> Markup | None:
    """Draw mean reward against KL to the reference with standard errors, or return None.

    The best of n of a run that is its own reference is a dashed line at the bound of its KL.
    """
    points, curves = reward_points(runs)
    if not points:
        return None
    label = "Mean reward against KL to the reference, one mark for each run"
    plot = scatter(points, curves, (KL_LABEL, "mean reward"), label)
    legend = [(point.css, point.shape, point.label) for point in points if point.label]
    if curves:
        legend.append(("plain", "dashed", "best of n of the reference, at the bound of its KL"))
    return figure(plot, legend)


def reward_points(runs: Sequence[RunRecord]) -> tuple[list[Point], list[Curve]]:
    """Return a point for each run with reward and KL, and the best of n of references."""
    points, curves = [], []
    for place, run in enumerate(runs):
        kl, reward = run.measure("kl"), run.measure("reward")
        if kl is None or reward is None:
            continue
        tip = f"{run.name} ({training(run)}): reward {with_error(reward)}, KL {with_error(kl)}"
        errors = bar(kl[1]), bar(reward[1])
        css = run_class(place)
        hollow = run.collapsed
        points.append(Point(kl[0], reward[0], css, tip, run.name, errors, hollow=hollow))
    for run in runs if points else ():
        rows = best_of_rows(run.evaluation)
        if rows:
            bounds, rewards = [row["kl_bound"] for row in rows], [row["reward"] for row in rows]
            curves.append(Curve(bounds, rewards, "plain", dashed=True))
            points += [
                Point(
                    *(
                        x,
                        y,
                        "plain",
                        f"{run.name}, best of {row['n']}: reward {y:.2f}, KL ≤ {x:.2f}",
                    ),
                    shape="cross",
                )
                for x, y, row in zip(bounds, rewards, rows, strict=True)
            ]
    return points, curves


def static_chart(chart: Chart) -> Markup:
    """Draw a chart over steps for readers without JavaScript."""
    steps = [x for line in chart.lines for x in line.xs]
    values = [y for line in chart.lines for y in line.ys]
    low, high = min(steps), max(steps)
    x = Axis(low, high if high > low else low + 1, "step")
    plot = Plot((440, 260), x, Axis(*span(values), chart.unit), f"{chart.title} against the step")
    for line in chart.lines:
        xs, ys = line.means or (line.xs, line.ys)
        plot.line(xs, ys, run_class(line.run), dashed=line.held_out)
        if line.held_out:
            for step, value in zip(xs, ys, strict=True):
                if math.isfinite(value):
                    plot.dot(step, value, run_class(line.run))
    for mark in chart.marks:
        plot.event(mark.step, run_class(mark.run), mark.words, whole=mark.kind == "collapse")
    legend: dict[tuple[str, str, str], Any] = {}
    for line in chart.lines:
        words = f"{line.name}, held out" if line.held_out else line.name
        legend[run_class(line.run), "dashed" if line.held_out else "line", words] = None
    return figure(plot, list(legend))
