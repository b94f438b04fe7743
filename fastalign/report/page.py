"""Render a self-contained page on one or more runs: verdict, charts, tables, samples."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from markupsafe import Markup

from fastalign.compare.results import PERSON_COLUMNS
from fastalign.data.conversation import prompt_key
from fastalign.page_templates import environment
from fastalign.report.charts import as_json, collapses, sections
from fastalign.report.comparisons import Comparisons, learning_curve
from fastalign.report.metric_table import Row
from fastalign.report.pictures import reward_against_kl, static_chart
from fastalign.report.reward import REWARD_COLUMNS, accuracy_by_length, reliability, reward_table
from fastalign.report.runs import RunRecord
from fastalign.report.speed import (
    SPEED_COLUMNS,
    TIME_COLUMNS,
    speed_table,
    time_picture,
    time_table,
)
from fastalign.report.summary import (
    PROVENANCE,
    differing_settings,
    provenance,
    training,
    verdict,
    with_error,
)
from fastalign.report.svg import run_class

NUM_SAMPLES_SHOWN = 24
NUM_STEPS_SHOWN = 6  # of the completions that were sampled while a run trained
NUM_PROMPTS_SHOWN = 4  # of them, the same at each step
NUM_ROLLOUTS_SHOWN = 240  # rows of samples.jsonl, of all runs
MOST_CHARACTERS = 1500  # of a prompt or a completion among these
# Charts that are about the optimiser and the machine.
TECHNICAL = (
    *("grad_norm", "learning_rate", "lr", "step_seconds", "tokens_per_second"),
    "peak_memory_bytes",
)
COLUMNS = ("run", "training", "reward", "KL", "accuracy", "seconds")


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


def rollout_rows(runs: Sequence[RunRecord]) -> list[tuple[int, Row, str]]:
    """Return place of the run, row and prompt of completions that were sampled while it trained.

    Of many, steps are left out evenly; texts are cut.
    """
    sampled = [place for place, run in enumerate(runs) if run.rollouts]
    found = []
    for place in sampled:
        by_step: dict[int, list[Row]] = {}
        for row in runs[place].rollouts:
            by_step.setdefault(row["step"], []).append(row)
        most = max(1, NUM_ROLLOUTS_SHOWN // len(sampled))
        per_step = max(map(len, by_step.values()))
        for step in spread(sorted(by_step), max(2, most // per_step)):
            rows = by_step[step][: max(1, most // 2)]
            found += [(place, cut(row), cut_text(prompt_key(row["prompt"]))) for row in rows]
    return found


def cut(row: Row) -> Row:
    """Return a row whose completion is not too long for a table."""
    return row | {"completion": cut_text(row["completion"])}


def cut_text(text: str) -> str:
    """Return a text of at most MOST_CHARACTERS."""
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} [...]"


def spread(values: Sequence[int], number: int) -> list[int]:
    """Return at most `number` of some values, the first and the last among them, spread evenly."""
    if len(values) <= number:
        return list(values)
    return [values[(len(values) - 1) * place // (number - 1)] for place in range(number)]


@cache
def static(name: str) -> str:
    """Return the text of a file beside the templates."""
    return files("fastalign.report").joinpath("static", name).read_text(encoding="utf-8")


def policy(scripts: Sequence[str], *, live: bool = False) -> str:
    """Return a Content-Security-Policy by which a page runs these scripts alone and loads nothing.

    A live page may ask its own server.
    """
    hashes = [hashlib.sha256(script.encode()).digest() for script in scripts]
    allowed = [f"'sha256-{base64.b64encode(value).decode()}'" for value in hashes]
    parts = {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": " ".join(allowed) or "'none'",
        "connect-src": "'self'" if live else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in parts.items())


def page_policy(page: str) -> str:
    """Return the policy that a page from `fill` states, for a server's header."""
    return page.partition('http-equiv="Content-Security-Policy" content="')[2].partition('"')[0]


def fill(template: str, *, charts: bool = False, watch: str = "", **values: Any) -> str:
    """Return a page from a template beside this module; values of models and data are escaped.

    Args:
        template: name of the template.
        charts: whether the page has charts over steps.
        watch: version of a live page, which looks for newer ones; empty for a page in a file.
        **values: what the template takes.
    """
    names = ["uPlot.iife.min.js", "report.js"] if charts else ["report.js"]
    scripts = [Markup(static(name).replace("</script", "<\\/script")) for name in names]
    css = static("uPlot.min.css") + static("report.css") if charts else static("report.css")
    given = {"css": Markup(css), "scripts": scripts, "watch": watch}
    found = environment("fastalign.report").get_template(template)
    page: str = found.render(policy=Markup(policy(scripts, live=bool(watch))), **given, **values)
    return page


def embedded(data: Any) -> Markup:
    """Return JSON that stands in a page's script element as data."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def collapse_warnings(runs: Sequence[RunRecord], places: Sequence[int]) -> list[str]:
    """Return a line for each run whose policy looked collapsed, with the steps where it began."""
    lines = []
    for place in places:
        steps = [f"{step:,}" for step, _ in collapses(runs[place])]
        if steps:
            more = f" and {len(steps) - 3} times more" if len(steps) > 3 else ""
            began = f"{', '.join(steps[:3])}{more}"
            lines.append(f"{runs[place].name}: the policy began to look collapsed at step {began}.")
    return lines


def render(
    runs: Sequence[RunRecord], comparisons: Sequence[Comparisons] = (), *, watch: str = ""
) -> str:
    """Return the report's page on runs and comparisons, which loads nothing from elsewhere.

    `watch` is the version of a page that looks for newer ones, as `fill` takes it.
    """
    found = sections(runs)
    rollouts = rollout_rows(runs)
    groups = [section.runs for section in found]
    return fill(
        "report.html.jinja",
        charts=bool(found),
        watch=watch,
        verdict=[*verdict(runs), *(line for each in comparisons for line in each.win_rates[:1])],
        classes=[run_class(place) for place in range(len(runs))],
        tables=tables(runs),
        provenance=(PROVENANCE, provenance(runs)),
        reliability=reliability(runs),
        accuracy_by_length=accuracy_by_length(runs),
        frontier=reward_against_kl(runs),
        time_picture=time_picture(runs),
        sections=found,
        section_warnings=[collapse_warnings(runs, places) for places in groups],
        differing=[differing_settings([runs[place] for place in places]) for places in groups],
        differing_names=[[runs[place].name for place in places] for places in groups],
        technical=TECHNICAL,
        static_chart=static_chart,
        data=embedded(as_json(runs, found)),
        comparisons=comparisons,
        person_columns=PERSON_COLUMNS,
        learning_curve=learning_curve(comparisons),
        names=[run.name for run in runs],
        samples=side_by_side(runs),
        over_time=[(run.name, *over_time(run)) for run in runs if over_time(run)[0]],
        rollouts=rollouts,
        num_rollouts=sum(len(run.rollouts) for run in runs),
        sampled=sorted({place for place, *_ in rollouts}),
        configs=[(run.name, yaml.safe_dump(run.config, sort_keys=False)) for run in runs],
    )
