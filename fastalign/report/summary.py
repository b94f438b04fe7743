"""The report's words on runs: a verdict, where they come from, and how their settings differ."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastalign.progress import duration
from fastalign.report.runs import RunRecord, best_of_rows, labels_of, short_path
from fastalign.yaml_file import flat_settings

Z = 1.959964  # of a 95 % interval of a normal variable
DASH = "\u2013"
PROVENANCE = ("run", "model", "data", "steps", "began", "time", "machine", "fastalign")
# Where a run writes, and how it goes on, says nothing about what it does.
NOT_COMPARED = ("run.dir", "run.resume", "run.overwrite", "track.name")


def with_error(measure: tuple[float, float] | None) -> str:
    """Return `5.81 ± 0.15`, `5.81` if the error is unknown, or a dash."""
    if measure is None:
        return DASH
    mean, error = measure
    return f"{mean:.2f}" if math.isnan(error) else f"{mean:.2f} ± {error:.2f}"


def training(run: RunRecord) -> str:
    """Describe a run: `sft`, `dpo, 0.1`, `reward: rao_kupper`, `ppo, 0.05, collapsed`."""
    method, strength, _ = labels_of(run)
    if run.metrics.logged("mean_reward"):
        method = f"reward: {method}"
    words = [method] if strength is None else [method, f"{strength:g}"]
    return ", ".join([*words, "collapsed"] if run.collapsed else words)


def base_of(run: RunRecord) -> str:
    """Return the path or name of the model that a run was trained from; empty if not known."""
    path = run.setting("model.path")
    return path if isinstance(path, str) else ""


def data_of(run: RunRecord) -> str:
    """Return a run's training data in words; of absolute paths the end alone."""
    train = run.setting("data.train")
    sources = train if isinstance(train, list) else [train] if train else []
    return ", ".join(short_path(str(source)) for source in sources)


def provenance(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Return the PROVENANCE of each run; a dash is not known."""
    rows = []
    for run in runs:
        machine = run.machine
        where = " on ".join(str(machine[key]) for key in ("device", "host") if machine.get(key))
        if machine.get("num_processes", 1) != 1:
            where = f"{machine['num_processes']} x {where}"
        made = " ".join(
            str(machine[key])[:12] for key in ("fastalign", "commit") if machine.get(key)
        )
        cells = (
            short_path(base_of(run)),
            data_of(run),
            str(run.num_steps or ""),
            run.began[:16].replace("T", " "),
            duration(run.seconds) if run.seconds else "",
            where,
            made,
        )
        rows.append((run.name, *(cell or DASH for cell in cells)))
    return rows


def differing_settings(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Return the settings in which runs differ: name, and the value of each run."""
    flat = [flat_settings(run.config) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    missing = object()
    rows = []
    for name in names:
        values = [settings.get(name, missing) for settings in flat]
        if name not in NOT_COMPARED and any(value != values[0] for value in values):
            rows.append((name, *(DASH if v is missing else setting_text(v) for v in values)))
    return rows


def setting_text(value: Any) -> str:
    """Return a setting's value as one types it; of an absolute path the end alone."""
    return short_path(value) if isinstance(value, str) else json.dumps(value, default=str)


def is_own_reference(run: RunRecord) -> bool:
    """Return whether an evaluation compares a model with itself."""
    config = (run.evaluation or {}).get("config") or {}
    paths = [(config.get(name) or {}).get("path") for name in ("model", "reference")]
    return bool(best_of_rows(run.evaluation)) or (paths[0] is not None and paths[0] == paths[1])


def baseline_of(run: RunRecord, runs: Sequence[RunRecord]) -> RunRecord | None:
    """Return the evaluated run whose model a run began from, else one that is its own reference."""
    others = [other for other in runs if other is not run and other.measure("reward")]
    base = base_of(run)
    for other in others:
        models = [] if other.folder is None else [other.folder / "model", other.folder / "adapter"]
        if base and Path(base).resolve() in models:
            return other
    return next(filter(is_own_reference, others), None)


def verdict(runs: Sequence[RunRecord]) -> list[str]:
    """Return two lines: what was trained from what, and how much better it is, at what KL.

    They are about the run whose evaluation has the highest reward, or the highest accuracy, among
    those that did not collapse; else about the last one.
    """
    if not runs:
        return []
    run, chosen = chosen_run(runs)
    first = f"{run.name} ({method_words(run)}) was trained"
    if base_of(run):
        first += f" from {short_path(base_of(run))}"
    if data_of(run):
        first += f" on {data_of(run)}"
    if run.num_steps:
        first += f": {run.num_steps:,} steps"
    if run.seconds:
        first += f" in {duration(run.seconds)}"
    return [f"{first}{chosen}.", outcome_of(run, runs)]


def method_words(run: RunRecord) -> str:
    """Return method and strength in words: `PPO, KL coefficient 0.05`, `DPO, β 0.1`, `SFT`."""
    method, strength, _ = labels_of(run)
    if run.metrics.logged("mean_reward"):
        return f"reward model, {method}"
    name = method.upper() if len(method) <= 4 else method  # an abbreviation
    if strength is None:
        return name
    return f"{name}, {'KL coefficient' if 'ppo' in run.config else 'β'} {strength:g}"


def chosen_run(runs: Sequence[RunRecord]) -> tuple[RunRecord, str]:
    """Return the run that the verdict is about, and why, in words."""
    for name in ("reward", "accuracy"):
        found = [
            (measure[0], run)
            for run in runs
            if (measure := run.measure(name)) and not run.collapsed and not is_own_reference(run)
        ]
        if found:
            best = max(found, key=lambda entry: entry[0])[1]
            why = f"; the best {name} of {len(found)} runs" if len(found) > 1 else ""
            return best, why
    return runs[-1], ""


def outcome_of(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """Return how much better a run is, with what certainty, and at what KL."""
    reward, kl = run.measure("reward"), run.measure("kl")
    if reward is not None:
        line = f"Reward {with_error(reward)}"
        base = baseline_of(run, runs)
        before = None if base is None else base.measure("reward")
        if base is not None and before is not None:
            line += f", {with_error(before)} before ({base.name}): {difference(reward, before)}"
        line += "" if kl is None else f"; KL to the reference {with_error(kl)} nats per answer"
        return line + ("; the policy collapsed." if run.collapsed else ".")
    accuracy = run.measure("accuracy")
    if accuracy is not None:
        line = f"Right on {accuracy[0]:.1%} of held-out pairs without ties"
        if not math.isnan(accuracy[1]):
            line += f" (95 % interval {interval(*accuracy, '.1%')})"
        length = run.measure("longer_wins_accuracy")
        return line + (f"; the longer response alone: {length[0]:.1%}." if length else ".")
    for name, words in (
        ("eval_rewards/accuracies", "Accuracy of the implicit reward on held-out pairs"),
        ("eval_accuracy", "Accuracy on held-out pairs"),
        ("eval_reward", "Reward of held-out prompts' answers"),
        ("eval_loss", "Held-out loss"),
        ("reward", "Reward of its samples"),
        ("loss", "Loss"),
    ):
        values = [value for value in run.series(name)[1] if math.isfinite(value)]
        if values:
            trend = f"{values[0]:.3g} at first, " if len(values) > 1 else ""
            ends = f"{words}: {trend}{values[-1]:.3g} at last."
            return f"{ends} It has not been evaluated on fresh samples (fastalign eval)."
    return "Nothing has been measured yet."


def difference(after: tuple[float, float], before: tuple[float, float]) -> str:
    """Return a difference of means and its interval, in words."""
    change, error = after[0] - before[0], math.hypot(after[1], before[1])
    if math.isnan(error):
        return f"{change:+.2f}"
    sure = "" if abs(change) > Z * error else ", which could be chance"
    return f"{change:+.2f} (95 % interval {interval(change, error, '+.2f')}{sure})"


def interval(mean: float, error: float, form: str) -> str:
    """Return the 95 % interval of a mean with a standard error, in words."""
    return f"{mean - Z * error:{form}} to {mean + Z * error:{form}}"
