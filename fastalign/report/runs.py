"""A run's folder as the report reads it: settings, metrics, evaluation, samples."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from fastalign.report.saved_weights import num_product_weights

Row = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind.

    Attributes:
        name: the folder's.
        config: `config.yaml`.
        metrics: `metrics.jsonl`, one dictionary a step.
        evaluation: `eval/eval.json`, or None.
        samples: `eval/samples.jsonl`, or nothing.
        machine: `machine.json`, or nothing.
        num_product_weights: of `model/`, those that a token is multiplied by; None: not there.
    """

    name: str
    config: dict[str, Any]
    metrics: list[Row]
    evaluation: Row | None
    samples: list[Row]
    machine: Row = field(default_factory=dict)
    num_product_weights: int | None = None

    @property
    def seconds(self) -> float:
        """Time spent in steps."""
        return math.fsum(number(row.get("step_seconds")) or 0.0 for row in self.metrics)

    @property
    def collapsed(self) -> bool:
        """Whether the run or its evaluation said so."""
        return is_collapsed(self.evaluation, self.metrics)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was logged."""
        found = [(row.get("step"), number(row.get(name))) for row in self.metrics]
        kept = [(step, value) for step, value in found if type(step) is int and value is not None]
        return [step for step, _ in kept], [value for _, value in kept]

    @property
    def skipped_steps(self) -> list[int]:
        """Steps that changed no weight."""
        return [step for step, value in zip(*self.series("skipped"), strict=True) if value]

    def measure(self, name: str) -> tuple[float, float] | None:
        """A measure of the evaluation and its standard error (NaN if unknown), or None."""
        return finite(self.evaluation or {}, name)

    def last(self, name: str) -> float | None:
        """The last finite value of a metric, or None."""
        values = [value for value in self.series(name)[1] if math.isfinite(value)]
        return values[-1] if values else None


def number(value: Any) -> float | None:
    """A logged number; one that JSON could not hold was written as text (`nan`, `inf`)."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def finite(values: Row, name: str) -> tuple[float, float] | None:
    """`name` and its standard error `name_se`, NaN where there is none; None: no finite number."""
    value, error = number(values.get(name)), number(values.get(f"{name}_se"))
    if value is None or not math.isfinite(value):
        return None
    return value, math.nan if error is None else error


def is_collapsed(evaluation: Row | None, metrics: Sequence[Row]) -> bool:
    """Whether the evaluation says `collapsed`, or the last step that says anything of it.

    That is true, a number other than 0, or a reason in words; a policy may recover.
    """
    of_steps = [row["collapsed"] for row in metrics if "collapsed" in row]
    said = [(evaluation or {}).get("collapsed"), *of_steps[-1:]]
    return any(value not in (None, False, 0, "", "0", "0.0", "false") for value in said)


def best_of_rows(evaluation: Row | None) -> list[Row]:
    """The best of n, where the model that was sampled from is the reference."""
    config = (evaluation or {}).get("config") or {}
    paths = [(config.get(name) or {}).get("path") for name in ("model", "reference")]
    if evaluation is None or paths[0] is None or paths[0] != paths[1]:
        return []
    return list(evaluation.get("best_of_n") or [])


def labels_of(run: RunRecord) -> tuple[str, float | None, int | None]:
    """Method, strength and seed as the settings tell them.

    The method is ppo, or the loss's name (of fresh pairs: `online dpo`), or sft. The strength is
    the KL's coefficient, or the loss's beta; sft and reward models have none.
    """

    def section(name: str) -> Row:
        value = run.config.get(name)
        return value if isinstance(value, dict) else {}

    seed = section("run").get("seed")
    if "ppo" in run.config:
        return "ppo", number(section("kl").get("coefficient")), seed
    method = str(section("loss").get("name", "sft"))
    if "pairs" in run.config:
        method = f"online {method}"
    return method, number(section("loss").get("beta")), seed


def read_runs(folders: Sequence[str | Path]) -> list[RunRecord]:
    """Reads each; runs whose folders have one name are told apart by the folders above.

    Raises:
        ValueError: a file is damaged.
        FileNotFoundError: a folder is no run's.
    """
    runs = [read_run(folder) for folder in folders]
    parts = [Path(folder).resolve().parts for folder in folders]
    named = []
    for run, own in zip(runs, parts, strict=True):
        alike = [other for other in parts if other != own]
        depth = 1
        while depth < len(own) and any(own[-depth:] == other[-depth:] for other in alike):
            depth += 1
        named.append(replace(run, name="/".join(own[-depth:])))
    return named


def read_run(folder: str | Path) -> RunRecord:
    """Reads a run's folder.

    Raises:
        ValueError: a file in it is damaged.
        FileNotFoundError: it is no run's folder.
    """
    path = Path(folder)
    for name in ("config.yaml", "metrics.jsonl"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path}: no {name}; expected the folder of a run (--run.dir)")
    evaluation = path / "eval" / "eval.json"
    samples = path / "eval" / "samples.jsonl"
    machine = path / "machine.json"
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        metrics = read_lines(path / "metrics.jsonl")
        rows = read_lines(samples) if samples.is_file() else []
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: a file of the run is damaged: {error}") from None
    return RunRecord(
        name=path.resolve().name,
        config=config if isinstance(config, dict) else {},
        metrics=metrics,
        evaluation=read_object(evaluation) if evaluation.is_file() else None,
        samples=rows,
        machine=read_object(machine) if machine.is_file() else {},
        num_product_weights=num_product_weights(path / "model"),
    )


def read_object(file: Path) -> Row:
    """One JSON object, such as the measures that `fastalign eval` wrote.

    Raises:
        ValueError: no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: a file of the run is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def read_lines(path: Path) -> list[Row]:
    """The objects of a JSON Lines file; a last line that is being written is left out.

    Raises:
        ValueError: a line is no JSON object.
    """
    text = path.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]
    for place, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: object {place}: expected a JSON object, got {row!r:.60}")
    return rows
