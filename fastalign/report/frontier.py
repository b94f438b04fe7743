"""Reward against KL of many runs: read, averaged over seeds, as a table and a picture."""

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fastalign.evaluation.statistics import estimate
from fastalign.output import shown
from fastalign.report.metric_table import MetricTable, Row
from fastalign.report.page import fill
from fastalign.report.pictures import KL_LABEL, Curve, Point, bar, figure, scatter
from fastalign.report.runs import (
    best_of_rows,
    finite,
    is_collapsed,
    labels_of,
    read_lines,
    read_object,
    read_run,
    short_path,
)
from fastalign.report.summary import with_error
from fastalign.report.svg import SHAPES, place_labels, run_class
from fastalign.yaml_file import read_yaml_file

Strength = float | str | None
COLUMNS = ("method", "strength", "reward", "KL", "runs", "collapsed")
PICTURES = (".png", ".svg", ".pdf")
# Curves differ in mark as well as colour, for colour-blind readers and for more than ten methods.
MARKS = "osD^vP*X<>"
STRENGTHS = "number at a mark: β of a loss, coefficient of the KL, n of best of n"


@dataclass(frozen=True)
class FrontierRun:
    """One evaluated run.

    Attributes:
        source: file or folder that the run was read from.
        method: name of the curve that the run belongs to.
        strength: beta, KL coefficient or n; None if the method has none.
        seed: seed of the run, if known.
        reward: mean and standard error over prompts; None if not measured or not finite.
        kl: KL to the reference, likewise.
        kl_is_bound: whether the KL is the bound of the best of n.
        collapsed: whether the run collapsed.
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
    """The average of the runs of one method and strength.

    `reward` and `kl` are means over the measured runs, including collapsed ones. The standard
    errors are over runs, or over prompts (`error_over`) if one run was measured. `sources` are the
    files or folders of its runs.
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
    sources: list[str] = field(compare=False)


def frontier_points(runs: Sequence[FrontierRun]) -> list[FrontierPoint]:
    """Return a point per method (in the order given) and strength (rising), averaged over seeds."""
    gathered: dict[str, dict[Strength, list[FrontierRun]]] = {}
    for run in runs:
        gathered.setdefault(run.method, {}).setdefault(run.strength, []).append(run)
    return [
        average(by_strength[strength])
        for by_strength in gathered.values()
        for strength in sorted(by_strength, key=in_order)
    ]


def in_order(strength: Strength) -> tuple[int, float, str]:
    """Return a sort key: numbers by size, then words, then None."""
    if isinstance(strength, float):
        return 0, strength, ""
    return (1, 0.0, strength) if strength is not None else (2, 0.0, "")


def over_runs(values: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Return the mean of runs' means, and its error: over runs, or that of the only run."""
    if not values:
        return None, None
    found = estimate([mean for mean, _ in values])
    error = values[0][1] if len(values) == 1 else found.standard_error
    return found.mean, error if math.isfinite(error) else None


def average(runs: Sequence[FrontierRun]) -> FrontierPoint:
    """Return the point of runs that differ only in their seed."""
    found = [(run.reward, run.kl) for run in runs if run.reward is not None and run.kl is not None]
    reward, reward_se = over_runs([reward for reward, _ in found])
    kl, kl_se = over_runs([kl for _, kl in found])
    is_bound = any(run.kl_is_bound for run in runs)
    num_collapsed = sum(run.collapsed for run in runs)
    return FrontierPoint(
        method=runs[0].method,
        strength=runs[0].strength,
        reward=reward,
        reward_se=reward_se,
        kl=kl,
        kl_se=None if is_bound else kl_se,  # a bound is no measurement
        kl_is_bound=is_bound,
        error_over={0: None, 1: "prompts"}.get(len(found), "runs"),
        num_runs=len(runs),
        num_measured=len(found),
        num_collapsed=num_collapsed,
        collapse_rate=num_collapsed / len(runs),
        sources=[run.source for run in runs],
    )


ENTRY_KEYS = ("method", "strength", "seed", "run", "best_of", "collapsed")


def read_frontier(sources: Sequence[str | Path]) -> list[FrontierRun]:
    """Read runs from folders, `eval.json` files in them, and lists (.yaml, .json, .jsonl).

    Raises:
        ValueError: if a file is damaged, an entry lacks its labels, or a run is given twice.
        FileNotFoundError: if a file or a run's evaluation is missing.
    """
    runs: list[FrontierRun] = []
    for source in sources:
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if path.is_dir():
            runs += from_folder(path, None)
            continue
        content = read_list(path)
        if isinstance(content, dict):
            folder = path.resolve().parent
            runs += from_folder(folder.parent if folder.name == "eval" else folder, path)
        else:
            runs += [
                from_entry(entry, f"{path}: entry {number}", path.parent)
                for number, entry in enumerate(content, 1)
            ]
    seen: dict[tuple[Any, ...], str] = {}
    for run in runs:
        key = (run.method, run.strength, run.seed)
        if run.seed is not None and key in seen:
            raise ValueError(
                f"{run.source}: method {run.method}, strength {run.strength}, seed {run.seed} is "
                f"there already ({seen[key]}); tell them apart in a list"
            )
        seen[key] = run.source
    return runs


def read_list(path: Path) -> Any:
    """Return a file's list of entries, or its mapping if it is an `eval.json`.

    Raises:
        ValueError: if the file is neither, or damaged.
    """
    try:
        if path.suffix == ".jsonl":
            content: Any = list(read_lines(path, may_grow=False))
        elif path.suffix in (".yaml", ".yml"):
            content = read_yaml_file(path)
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    is_evaluation = isinstance(content, dict) and ("reward" in content or "kl" in content)
    if not is_evaluation and not isinstance(content, list):
        raise ValueError(
            f"{path}: expected a list of runs (method, strength, seed, run) or an eval.json, got "
            f"{type(content).__name__}"
        )
    return content


def from_folder(folder: Path, evaluation_file: Path | None) -> Iterator[FrontierRun]:
    """Yield a run labelled by its config.yaml, and its best of n if it is its own reference."""
    run = read_run(folder)
    evaluation = run.evaluation
    if evaluation_file is not None:
        evaluation = read_object(evaluation_file)
    method, strength, seed = labels_of(run)
    source = str(evaluation_file or folder)
    collapsed = is_collapsed(evaluation, run.metrics)
    yield measured(source, (method, strength, seed), evaluation, collapsed)
    for row in best_of_rows(evaluation):
        if row["n"] > 1:
            labels = ("best of n", float(row["n"]), seed)
            yield measured(source, labels, evaluation, False, row["n"])


def from_entry(entry: Any, where: str, folder: Path) -> FrontierRun:
    """Return a run with the labels of a list's entry; its path is relative to the list.

    Raises:
        ValueError: if a key is unknown or missing, or a value has the wrong type.
        FileNotFoundError: if the run has no evaluation.
    """
    if not isinstance(entry, dict) or not set(entry) <= set(ENTRY_KEYS):
        raise ValueError(f"{where}: expected the keys {', '.join(ENTRY_KEYS)}, got {entry!r}")
    for name, kinds in (
        ("method", (str,)),
        ("run", (str,)),
        ("strength", (int, float, str, type(None))),
        ("seed", (int, type(None))),
        ("best_of", (int, type(None))),
        ("collapsed", (bool, type(None))),
    ):
        value = entry.get(name)
        if type(value) not in kinds:
            allowed = ", ".join(kind.__name__.removesuffix("Type") for kind in kinds)
            raise ValueError(f"{where}: {name}: expected {allowed}, got {value!r}")
    path = folder / entry["run"]
    is_folder = path.is_dir()
    file = path / "eval" / "eval.json" if is_folder else path
    home = path if is_folder else path.parent.parent if path.parent.name == "eval" else path.parent
    log = home / "metrics.jsonl"
    metrics = MetricTable(read_lines(log) if log.is_file() else [])
    evaluation = read_object(file) if file.is_file() else None
    collapsed = bool(entry.get("collapsed")) or is_collapsed(evaluation, metrics)
    if evaluation is None and not collapsed:
        raise FileNotFoundError(f"{where}: no {file}; evaluate the run with `fastalign eval`")
    labels = (entry["method"], as_strength(entry.get("strength")), entry.get("seed"))
    return measured(f"{where} ({path})", labels, evaluation, collapsed, entry.get("best_of"))


def as_strength(value: Any) -> Strength:
    """Return a number if the value is one, since YAML reads `1e-3` as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None if value is None else str(value)
    return number if math.isfinite(number) else str(value)


def measured(
    source: str,
    labels: tuple[str, Strength, int | None],
    evaluation: Row | None,
    collapsed: bool,
    best_of: int | None = None,
) -> FrontierRun:
    """Return the run with its measures, or with those of its best of n.

    Raises:
        ValueError: if reward or KL is missing, or the evaluation has no such best of n.
    """
    values = evaluation or {}
    if best_of is not None:
        rows = [row for row in values.get("best_of_n") or [] if row["n"] == best_of]
        if not rows:
            raise ValueError(f"{source}: best_of: the evaluation has no best of {best_of}")
        values = {**rows[0], "kl": rows[0]["kl_bound"], "kl_se": 0.0}
    reward, kl = (finite(values, name) for name in ("reward", "kl"))
    if not collapsed and (reward is None or kl is None):
        missing = "reward" if reward is None else "kl"
        raise ValueError(f"{source}: expected a finite {missing} in the evaluation, got none")
    return FrontierRun(source, *labels, reward, kl, best_of is not None, collapsed)


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
    found = (p for p in points if p.method.lower() == method.lower() and p.reward is not None)
    return next(found, None)


def curves_of(
    points: Sequence[FrontierPoint], origin: FrontierPoint | None
) -> dict[str, list[FrontierPoint]]:
    """Return the measured points of each method, in the order of a curve that leaves the origin."""
    curves: dict[str, list[FrontierPoint]] = {}
    for point in points:
        if point is not origin and point.kl is not None:
            curves.setdefault(point.method, []).append(point)
    for method, curve in curves.items():
        if origin is not None:  # the line leaves it for the end that is nearer
            away = [abs((point.kl or 0.0) - (origin.kl or 0.0)) for point in curve]
            curves[method] = curve[::-1] if away[0] > away[-1] else curve
    return curves


def check_picture(suffix: str) -> None:
    """Raise ValueError if a picture of this kind needs matplotlib, an extra, and it is missing."""
    if suffix in PICTURES and find_spec("matplotlib") is None:
        raise ValueError(
            f"out: {suffix} needs matplotlib (pip install 'fastalign[report]'); .html does not"
        )


def draw_frontier(points: Sequence[FrontierPoint], origin: FrontierPoint | None) -> Any:
    """Draw reward against KL with standard errors; marks are hollow if some runs collapsed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.4), layout="constrained")
    axes: Any = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    start = [] if origin is None else [origin]
    drawn: list[tuple[FrontierPoint, str]] = []
    for number, (method, curve) in enumerate(curves_of(points, origin).items()):
        colour, mark = f"C{number % 10}", MARKS[number % len(MARKS)]
        is_bound = any(point.kl_is_bound for point in curve)
        axes.plot(
            [point.kl for point in (*start, *curve)],
            [point.reward for point in (*start, *curve)],
            color=colour,
            linewidth=1,
            alpha=0.6,
            linestyle="--" if is_bound else "-",
        )
        for point in curve:
            draw_point(axes, point, colour, mark)
            drawn.append((point, colour))
        bound = " (KL: the bound)" if is_bound else ""
        axes.plot([], [], mark, color=colour, label=plain(method) + bound)
    if origin is not None:
        draw_point(axes, origin, "black", "*")
        drawn.append((origin, "black"))
        axes.plot([], [], "*", color="black", label=plain(origin.method))
        axes.axhline(origin.reward, color="black", linewidth=0.6, linestyle=":")
    axes.set(xlabel=KL_LABEL, ylabel="mean reward")
    axes.legend(fontsize=8, frameon=False, title=STRENGTHS, title_fontsize=7)
    label_points(figure, axes, drawn)
    return figure


def draw_point(axes: Any, point: FrontierPoint, colour: str, mark: str) -> None:
    """Draw a mark with its error bars."""
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


def label_points(figure: Any, axes: Any, drawn: Sequence[tuple[FrontierPoint, str]]) -> None:
    """Write the strengths beside the marks, so that none covers another."""
    figure.draw_without_rendering()  # by which the axes have their place
    places = [axes.transData.transform((point.kl, point.reward)) for point, _ in drawn]
    texts = [plain(strength_text(point.strength)) for point, _ in drawn]
    frame, points = axes.get_window_extent(), 72 / figure.dpi
    corners = place_labels(
        [(x, -y) for x, y in places],  # downwards
        [5.5 * len(text) for text in texts],
        (frame.x0, -frame.y1, frame.x1, -frame.y0),
        height=11,
    )
    for (point, colour), text, (x, y), (left, bottom) in zip(
        drawn, texts, places, corners, strict=True
    ):
        axes.annotate(
            text,
            (point.kl, point.reward),
            xytext=((left - x) * points, (-bottom - y) * points),
            textcoords="offset points",  # which is the same at any resolution
            fontsize=7,
            color=colour,
        )


def plain(text: str) -> str:
    """Return text that matplotlib does not parse as mathematics, safe to show."""
    return shown(text).replace("$", r"\$")


def frontier_picture(points: Sequence[FrontierPoint], origin: FrontierPoint | None) -> Markup:
    """Draw the same for a page: a mark's runs are shown on hover."""
    marks, curves, legend = [], [], []
    start = [] if origin is None else [origin]
    for number, (method, curve) in enumerate(curves_of(points, origin).items()):
        css, shape = run_class(number), SHAPES[number % len(SHAPES)]
        is_bound = any(point.kl_is_bound for point in curve)
        known = [point for point in (*start, *curve) if point.kl is not None]
        xs, ys = [point.kl or 0.0 for point in known], [point.reward or 0.0 for point in known]
        curves.append(Curve(xs, ys, css, dashed=is_bound))
        marks += [mark_of(point, css, shape) for point in curve]
        legend.append((css, shape, f"{method}{' (KL: the bound)' if is_bound else ''}"))
    if origin is not None:
        marks.append(mark_of(origin, "plain", "star"))
        legend.append(("plain", "star", origin.method))
    if not marks:
        return Markup("<p>No run has been evaluated.</p>")
    label = "Mean reward against KL to the reference, one curve for each method"
    axes = KL_LABEL, "mean reward"
    return figure(scatter(marks, curves, axes, label, (880, 520)), legend)


def mark_of(point: FrontierPoint, css: str, shape: str) -> Point:
    """Return a point's mark; its words on hover name its runs."""
    assert point.kl is not None
    assert point.reward is not None
    words = strength_text(point.strength)
    tip = f"{point.method}{f', {words}' if words else ''}: reward "
    tip += f"{with_error(pair(point.reward, point.reward_se))}, KL "
    tip += f"{'≤ ' if point.kl_is_bound else ''}{with_error(pair(point.kl, point.kl_se))}"
    tip += f"; {point.num_collapsed} of {point.num_runs} collapsed" if point.num_collapsed else ""
    runs = [short_path(source) for source in point.sources]
    tip += f"; {', '.join(runs[:4])}{' ...' if len(runs) > 4 else ''}"
    errors = bar(point.kl_se), bar(point.reward_se)
    hollow = bool(point.num_collapsed)
    return Point(point.kl, point.reward, css, tip, words, errors, shape, hollow)


def render_frontier(
    points: Sequence[FrontierPoint], origin: FrontierPoint | None, suffix: str
) -> bytes:
    """Return a page (.html) with picture and table, or the picture alone (.png, .svg, .pdf)."""
    if suffix != ".html":
        stream = io.BytesIO()
        draw_frontier(points, origin).savefig(stream, format=suffix.removeprefix("."), dpi=150)
        return stream.getvalue()
    return fill(
        "frontier.html.jinja",
        columns=COLUMNS,
        table=frontier_table(points),
        picture=frontier_picture(points, origin),
        strengths=STRENGTHS,
    ).encode()
