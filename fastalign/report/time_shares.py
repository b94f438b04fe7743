"""Where the time of an iteration goes: sampling, weights, scores, updates; or a gradient's step."""

import math
from collections.abc import Mapping, Sequence

from fastalign.report.pictures import as_data_uri, new_figure, plain
from fastalign.report.runs import Row, RunRecord, number

# Label and metric; the sync is logged as a part of generating too, and is shown apart.
ROLLOUT_PHASES = {
    "generate": "time/generate_seconds",
    "sync": "time/sync_seconds",
    "score": "time/score_seconds",
    "prepare": "time/prepare_seconds",
    "update": "time/update_seconds",
}
STEP_PHASES = {"gradient": "time/gradient_seconds", "optimizer": "time/optimizer_seconds"}
PHASES = ROLLOUT_PHASES | STEP_PHASES
OTHER = "other"
TIME_COLUMNS = ("run", "seconds an iteration", *PHASES, OTHER)


def phase_seconds(run: RunRecord) -> dict[str, float] | None:
    """Mean seconds of each phase in an iteration, and of what is left of it; None: not logged.

    A sampler that is the policy itself logs no sync, for it has none.
    """
    found = [phases for row in run.metrics if (phases := phases_of(row)) is not None]
    if not found:
        return None
    return {name: math.fsum(row[name] for row in found) / len(found) for name in found[0]}


def phases_of(row: Row) -> dict[str, float] | None:
    """The phases' seconds in one iteration, if it logged those of its algorithm; others are 0."""
    has = STEP_PHASES if STEP_PHASES["gradient"] in row else ROLLOUT_PHASES
    logged = {name: number(row.get(metric)) for name, metric in has.items()}
    if PHASES["sync"] not in row:
        logged["sync"] = 0.0
    total = number(row.get("step_seconds"))
    if total is None or None in logged.values():
        return None
    phases = {name: logged.get(name) or 0.0 for name in PHASES}
    if not all(math.isfinite(value) and value >= 0 for value in (total, *phases.values())):
        return None
    phases["generate"] = max(0.0, phases["generate"] - phases["sync"])
    return {**phases, OTHER: max(0.0, total - math.fsum(phases.values()))}


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Of the whole, which they add up to."""
    whole = math.fsum(seconds.values())
    return {name: value / whole if whole else 0.0 for name, value in seconds.items()}


def time_table(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Rows under TIME_COLUMNS of the runs that logged their phases."""
    rows = []
    for run in runs:
        seconds = phase_seconds(run)
        if seconds is not None:
            whole = math.fsum(seconds.values())
            rows.append(
                (run.name, f"{whole:.2f}", *(f"{share:.1%}" for share in shares(seconds).values()))
            )
    return rows


def time_picture(runs: Sequence[RunRecord]) -> str | None:
    """A stacked bar a run, of the phases' shares; or None without any."""
    found = [(run.name, seconds) for run in runs if (seconds := phase_seconds(run)) is not None]
    if not found:
        return None
    figure, axes = new_figure(7.2, 1.2 + 0.45 * len(found))
    names = [plain(name) for name, _ in found]
    places = list(range(len(found)))
    start = [0.0] * len(found)
    for index, phase in enumerate((*PHASES, OTHER)):
        widths = [shares(seconds)[phase] for _, seconds in found]
        color = "0.8" if phase == OTHER else f"C{index}"
        axes.barh(places, widths, left=start, label=phase, color=color, height=0.6)
        start = [left + width for left, width in zip(start, widths, strict=True)]
    axes.set_yticks(places, names)
    axes.set_axisbelow(True)
    axes.invert_yaxis()  # in the table's order
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of an iteration's time")
    figure.legend(loc="outside upper center", ncols=len(PHASES) + 1, fontsize=8, frameon=False)
    return as_data_uri(figure)
