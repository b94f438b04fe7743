"""The frontier's table and picture: one curve per method, all from the same starting point."""

import io
import math
from collections.abc import Sequence
from typing import Any

from fastalign.report.frontier import FrontierPoint, Strength
from fastalign.report.page import fill, with_error
from fastalign.report.pictures import KL_LABEL, as_data_uri, bar, label, new_figure, plain

COLUMNS = ("method", "strength", "reward", "KL", "runs", "collapsed")
PICTURES = (".png", ".svg", ".pdf")
# Curves differ in mark as well as colour, for colour-blind readers and for more than ten methods.
MARKS = "osD^vP*X<>"


def strength_text(strength: Strength) -> str:
    """Return a number as `0.1`, a word as it is, and None as an empty cell."""
    if strength is None:
        return ""
    return strength if isinstance(strength, str) else f"{strength:g}"


def frontier_table(points: Sequence[FrontierPoint]) -> list[tuple[str, ...]]:
    """Return the COLUMNS of each point; a KL that is a bound is marked by `≤`."""
    return [
        (
            point.method,
            strength_text(point.strength),
            with_error(pair(point.reward, point.reward_se)),
            ("≤ " if point.kl_is_bound else "") + with_error(pair(point.kl, point.kl_se)),
            str(point.num_runs),
            f"{point.num_collapsed} of {point.num_runs} ({point.collapse_rate:.0%})",
        )
        for point in points
    ]


def pair(mean: float | None, error: float | None) -> tuple[float, float] | None:
    """Return a mean and its error (NaN if unknown); None without a mean."""
    if mean is None:
        return None
    return mean, math.nan if error is None else error


def find_origin(points: Sequence[FrontierPoint], method: str) -> FrontierPoint | None:
    """Return the measured point of a method (in any case), where the curves start; else None."""
    found = [p for p in points if p.method.lower() == method.lower() and p.reward is not None]
    return found[0] if found else None


def draw_frontier(points: Sequence[FrontierPoint], origin: FrontierPoint | None) -> Any:
    """Draw reward against KL with standard errors; marks are hollow if some runs collapsed."""
    figure, axes = new_figure(8.0, 5.4)
    methods = list(dict.fromkeys(point.method for point in points if point is not origin))
    for number, method in enumerate(methods):
        curve = [p for p in points if p.method == method and p is not origin and p.kl is not None]
        if not curve:
            continue
        if origin is not None and distance(origin, curve[0]) > distance(origin, curve[-1]):
            curve.reverse()  # the line leaves the origin for the end that is nearer
        colour, mark = f"C{number % 10}", MARKS[number % len(MARKS)]
        start = [] if origin is None else [origin]
        axes.plot(
            [point.kl for point in (*start, *curve)],
            [point.reward for point in (*start, *curve)],
            color=colour,
            linewidth=1,
            alpha=0.6,
            linestyle="--" if any(point.kl_is_bound for point in curve) else "-",
        )
        for point in curve:
            draw_point(axes, point, colour, mark)
        bound = " (KL: the bound)" if any(point.kl_is_bound for point in curve) else ""
        axes.plot([], [], mark, color=colour, label=plain(method) + bound)
    if origin is not None:
        draw_point(axes, origin, "black", "*")
        axes.plot([], [], "*", color="black", label=plain(origin.method))
        axes.axhline(origin.reward, color="black", linewidth=0.6, linestyle=":")
    label(figure, KL_LABEL, "mean reward")
    return figure


def distance(one: FrontierPoint, other: FrontierPoint) -> float:
    """Return the distance between the KLs of two measured points."""
    return abs((one.kl or 0.0) - (other.kl or 0.0))


def draw_point(axes: Any, point: FrontierPoint, colour: str, mark: str) -> None:
    """Draw a mark with its error bars and its strength."""
    axes.errorbar(
        point.kl,
        point.reward,
        xerr=bar(point.kl_se),
        yerr=bar(point.reward_se),
        fmt=mark,
        color=colour,
        capsize=2,
        elinewidth=0.8,
        markerfacecolor="white" if point.num_collapsed else colour,
    )
    axes.annotate(
        plain(strength_text(point.strength)),
        (point.kl, point.reward),
        xytext=(5, 4),
        textcoords="offset points",
        fontsize=7,
        color=colour,
    )


def render_frontier(
    points: Sequence[FrontierPoint], origin: FrontierPoint | None, suffix: str
) -> bytes:
    """Return a page (.html) with picture and table, or the picture alone (.png, .svg, .pdf)."""
    figure = draw_frontier(points, origin)
    if suffix != ".html":
        stream = io.BytesIO()
        figure.savefig(stream, format=suffix.removeprefix("."), dpi=150)
        return stream.getvalue()
    return fill(
        "frontier.html.jinja",
        columns=COLUMNS,
        table=frontier_table(points),
        picture=as_data_uri(figure),
    ).encode()
