"""Render a self-contained page on one or more runs: tables, pictures, samples side by side."""

import math
from collections.abc import Sequence
from typing import Any

import yaml

from fastalign.compare.results import PERSON_COLUMNS
from fastalign.data.conversation import prompt_key
from fastalign.page_templates import environment
from fastalign.report.comparisons import Comparisons, learning_curve
from fastalign.report.metric_table import Row
from fastalign.report.pictures import SECTIONS, curve, reward_against_kl
from fastalign.report.reward import REWARD_COLUMNS, accuracy_by_length, reliability, reward_table
from fastalign.report.runs import RunRecord, labels_of
from fastalign.report.speed import (
    SPEED_COLUMNS,
    TIME_COLUMNS,
    speed_table,
    time_picture,
    time_table,
)

NUM_SAMPLES_SHOWN = 24
NUM_STEPS_SHOWN = 6  # of the completions that were sampled while a run trained
NUM_PROMPTS_SHOWN = 4  # of each, or of all where the same held-out ones are sampled each time
COLUMNS = ("method", "training", "reward", "KL", "accuracy", "seconds")


def with_error(measure: tuple[float, float] | None) -> str:
    """Return `5.81 ± 0.15`, `5.81` if the error is unknown, or a dash."""
    if measure is None:
        return "–"  # noqa: RUF001 (a dash is meant)
    mean, error = measure
    if math.isnan(error):
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {error:.2f}"


def training(run: RunRecord) -> str:
    """Describe a run: `sft`, `dpo, 0.1`, `reward: rao_kupper`, `ppo, 0.05, collapsed`."""
    method, strength, _ = labels_of(run)
    if run.metrics.logged("mean_reward"):
        method = f"reward: {method}"
    words = [method] if strength is None else [method, f"{strength:g}"]
    return ", ".join([*words, "collapsed"] if run.collapsed else words)


def accuracy(run: RunRecord) -> tuple[float, float] | None:
    """Return the evaluation's accuracy, or the last logged one with an unknown error."""
    measured = run.measure("accuracy")
    for name in ("eval_accuracy", "eval_rewards/accuracies"):
        last = run.last(name)
        if measured is None and last is not None:
            measured = last, math.nan
    return measured


def table(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Return the COLUMNS of each run: measures with standard errors, seconds in training steps."""
    return [
        (
            run.name,
            training(run),
            with_error(run.measure("reward")),
            with_error(run.measure("kl")),
            with_error(accuracy(run)),
            f"{run.seconds:.0f}",
        )
        for run in runs
    ]


def tables(runs: Sequence[RunRecord]) -> dict[str, tuple[Sequence[str], list[tuple[str, ...]]]]:
    """Return columns and rows of each table; without rows a table is not shown."""
    return {
        "runs": (COLUMNS, table(runs)),
        "rewards": (REWARD_COLUMNS, reward_table(runs)),
        "speed": (SPEED_COLUMNS, speed_table(runs)),
        "time": (TIME_COLUMNS, time_table(runs)),
    }


def side_by_side(runs: Sequence[RunRecord]) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """Return the prompts that all sampled runs share, each with the runs' first completions."""
    by_run: list[dict[str, dict[str, Any]]] = []
    for run in runs:
        first: dict[str, dict[str, Any]] = {}
        for row in run.samples:
            if "prompt" in row and "completion" in row:
                first.setdefault(prompt_key(row["prompt"]), row)
        by_run.append(first)
    sampled = [first for first in by_run if first]
    if not sampled:
        return []
    common = [key for key in sampled[0] if all(key in first for first in sampled)]
    return [(key, [first.get(key) for first in by_run]) for key in common[:NUM_SAMPLES_SHOWN]]


def over_time(run: RunRecord) -> tuple[list[int], list[tuple[str, list[Row | None]]]]:
    """Return steps of a run, spread evenly, and for some prompts a completion at each of them.

    These are held-out prompts, the same at each step, if the run has sampled any.
    """
    rows = [row for row in run.rollouts if row.get("held_out")]
    by_step: dict[int, dict[str, Row]] = {}
    for row in rows:
        by_step.setdefault(row["step"], {}).setdefault(prompt_key(row.get("prompt", "")), row)
    steps = spread(sorted(by_step), NUM_STEPS_SHOWN)
    prompts = list(by_step[steps[0]])[:NUM_PROMPTS_SHOWN] if steps else []
    return steps, [(key, [by_step[step].get(key) for step in steps]) for key in prompts]


def trained_on(run: RunRecord) -> list[tuple[int, str, Row]]:
    """Return step, prompt and row of some completions that a run was trained on."""
    by_step: dict[int, list[Row]] = {}
    for row in run.rollouts:
        if not row.get("held_out"):
            by_step.setdefault(row["step"], []).append(row)
    return [
        (step, prompt_key(row.get("prompt", "")), row)
        for step in spread(sorted(by_step), NUM_STEPS_SHOWN)
        for row in by_step[step][:NUM_PROMPTS_SHOWN]
    ]


def spread(values: Sequence[int], number: int) -> list[int]:
    """Return at most `number` of some values, the first and the last among them, spread evenly."""
    if len(values) <= number:
        return list(values)
    return [values[(len(values) - 1) * place // (number - 1)] for place in range(number)]


def fill(template: str, **values: Any) -> str:
    """Return a page from a template beside this module; values of models and data are escaped."""
    page: str = environment("fastalign.report").get_template(template).render(**values)
    return page


def render(runs: Sequence[RunRecord], comparisons: Sequence[Comparisons] = ()) -> str:
    """Return the report's page on runs and comparisons, which loads nothing from elsewhere."""
    sections = {
        title: {label: curve(runs, name, label) for name, label in names.items()}
        for title, names in SECTIONS.items()
    }
    return fill(
        "report.html.jinja",
        tables=tables(runs),
        reliability=reliability(runs),
        accuracy_by_length=accuracy_by_length(runs),
        frontier=reward_against_kl(runs),
        time_picture=time_picture(runs),
        sections={title: curves for title, curves in sections.items() if any(curves.values())},
        comparisons=comparisons,
        person_columns=PERSON_COLUMNS,
        learning_curve=learning_curve(comparisons),
        names=[run.name for run in runs],
        samples=side_by_side(runs),
        over_time=[(run.name, *over_time(run)) for run in runs if over_time(run)[0]],
        trained_on=[(run.name, trained_on(run)) for run in runs if trained_on(run)],
        configs=[(run.name, yaml.safe_dump(run.config, sort_keys=False)) for run in runs],
    )
