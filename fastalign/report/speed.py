"""The report's sections on speed: throughput, memory, gradient norms, time by phase."""

import math
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
from markupsafe import Markup

from fastalign.report.metric_table import Row
from fastalign.report.pictures import figure
from fastalign.report.runs import RunRecord
from fastalign.report.svg import Axis, Plot

SPEED_COLUMNS = (
    *("run", "steps", "skipped", "s/step", "tokens/s", "peak MiB"),
    *("grad norm", "largest", "model_flops_per_second", "utilisation"),
)
# Peak dense bfloat16 FLOPs per second, from NVIDIA's data sheets.
PEAKS = {
    "NVIDIA A100": 312e12,  # and whatever follows a dash, such as -SXM4-80GB
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def tokens_per_second(run: RunRecord) -> float | None:
    """Return the packed tokens of all steps that log both over their time; None if not logged."""
    has_seconds, seconds = run.metrics.numbers("step_seconds")
    has_rate, rates = run.metrics.numbers("tokens_per_second")
    known = has_seconds & has_rate & np.isfinite(seconds * rates)
    total = math.fsum(seconds[known].tolist())
    return math.fsum((seconds * rates)[known].tolist()) / total if total else None


def model_flops_per_second(run: RunRecord) -> float | None:
    """Return 6 N (4 N with a frozen base) times the tokens per second; None if unknown.

    N is the number of weights that a token is multiplied by. Attention, recomputed activations and
    references are not counted. Runs that sample have no such number, since they do other work.
    """
    speed, weights = tokens_per_second(run), run.num_product_weights
    if speed is None or weights is None or "sampling" in run.config:
        return None
    lora = (run.config.get("model") or {}).get("lora") or {}
    return (4 if lora.get("rank") else 6) * weights * speed


def peak_of(machine: Row) -> float | None:
    """Return the peak FLOPs per second of a run's devices; None if unknown or not bfloat16."""
    if machine.get("products") != "bfloat16":
        return None
    name = str(machine.get("device"))
    if "MIG" in name.split():  # a part of a device
        return None
    found = [peak for known, peak in PEAKS.items() if name == known or name.startswith(known + "-")]
    return found[0] * int(machine.get("num_processes", 1)) if found else None


def utilisation(run: RunRecord) -> float | None:
    """Return the model FLOPs as a share of the devices' peak; None if either is unknown."""
    flops, peak = model_flops_per_second(run), peak_of(run.machine)
    return None if flops is None or peak is None else flops / peak


def speed_table(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Return the SPEED_COLUMNS of each run that logged its tokens per second."""
    return [row_of(run) for run in runs if tokens_per_second(run) is not None]


def row_of(run: RunRecord) -> tuple[str, ...]:
    """Return one run's cells, with a dash for an unknown number."""

    def finite(name: str) -> list[float]:
        return [value for value in run.series(name)[1] if math.isfinite(value)]

    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)  # noqa: RUF001 (a dash is meant)

    memory, norms = finite("peak_memory_bytes"), finite("grad_norm")
    return (
        run.name,
        str(len(finite("step_seconds"))),
        str(len(run.skipped_steps)),
        shown(median(finite("step_seconds")), ".2f"),
        shown(tokens_per_second(run), ".0f"),
        shown(max(memory) / 2**20 if memory else None, ".0f"),
        shown(median(norms) if norms else None, ".3g"),
        shown(max(norms) if norms else None, ".3g"),
        shown(model_flops_per_second(run), ".3g"),
        shown(utilisation(run), ".1%"),
    )


# Label and metric. The logged time of generating includes the sync, which is shown separately.
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
    """Return the mean seconds of each phase of an iteration and of its rest; None if not logged.

    The transformers sampler logs no sync, since it samples from the policy itself.
    """
    table = run.metrics
    known, total = table.numbers("step_seconds")
    is_step = table.has(STEP_PHASES["gradient"])
    seconds = {}
    for name, metric in PHASES.items():
        logged, values = table.numbers(metric)
        needed = is_step if name in STEP_PHASES else ~is_step
        if name == "sync":
            needed = needed & table.has(metric)
        seconds[name] = np.where(needed, values, 0.0)
        known = known & (logged | ~needed)
    valid = [np.isfinite(values) & (values >= 0) for values in (total, *seconds.values())]
    rows = known & np.logical_and.reduce(valid)
    if not rows.any():
        return None
    seconds["generate"] = np.maximum(0.0, seconds["generate"] - seconds["sync"])
    seconds[OTHER] = np.maximum(0.0, total - sum(seconds.values()))
    return {
        name: math.fsum(values[rows].tolist()) / rows.sum().item()
        for name, values in seconds.items()
    }


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return each phase's share of the sum."""
    whole = math.fsum(seconds.values())
    return {name: value / whole if whole else 0.0 for name, value in seconds.items()}


def time_table(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Return the TIME_COLUMNS of each run that logged its phases."""
    rows = []
    for run in runs:
        seconds = phase_seconds(run)
        if seconds is not None:
            whole = math.fsum(seconds.values())
            rows.append(
                (run.name, f"{whole:.2f}", *(f"{share:.1%}" for share in shares(seconds).values()))
            )
    return rows


def time_bars(runs: Sequence[RunRecord]) -> list[tuple[str, list[tuple[str, float, float]]]]:
    """Return name and phases, with the ends of their bars, of each run that logged them."""
    bars = []
    for run in runs:
        seconds = phase_seconds(run)
        if seconds is not None:
            start, parts = 0.0, []
            for phase, share in shares(seconds).items():
                parts.append((phase, start, start + share))
                start += share
            bars.append((run.name, parts))
    return bars


def time_picture(runs: Sequence[RunRecord]) -> Markup | None:
    """Draw a stacked bar of the phases' shares for each run, or return None without any."""
    bars = time_bars(runs)
    if not bars:
        return None
    rows = [(-float(place), name) for place, (name, _) in enumerate(bars)]  # as in the table
    plot = Plot(
        (720, 50 + 30 * len(bars)),
        Axis(0.0, 1.0, "share of an iteration's time"),
        Axis(-len(bars) + 0.5, 0.5, "", rows),
        "Share of an iteration's time in each phase, one bar for each run",
    )
    css = {phase: f"phase-{place}" for place, phase in enumerate((*PHASES, OTHER))}
    for (height, name), (_, parts) in zip(rows, bars, strict=True):
        for phase, left, right in parts:
            if right > left:
                plot.bar(left, right, height, 18, css[phase], f"{name}: {phase} {right - left:.1%}")
    drawn = {phase for _, parts in bars for phase, left, right in parts if right > left}
    return figure(plot, [(name, "square", phase) for phase, name in css.items() if phase in drawn])
