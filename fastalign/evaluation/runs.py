"""A run's folder as the report reads it: settings, metrics, evaluation, samples."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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
    """

    name: str
    config: dict[str, Any]
    metrics: list[Row]
    evaluation: Row | None
    samples: list[Row]

    @property
    def seconds(self) -> float:
        """Time spent in steps."""
        return float(sum(number(row.get("step_seconds", 0.0)) for row in self.metrics))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was logged."""
        rows = [row for row in self.metrics if name in row]
        return [int(row["step"]) for row in rows], [number(row[name]) for row in rows]

    def measure(self, name: str) -> tuple[float, float] | None:
        """A measure of the evaluation and its standard error, or None."""
        if self.evaluation is None or name not in self.evaluation:
            return None
        return float(self.evaluation[name]), float(self.evaluation[f"{name}_se"])


def number(value: Any) -> float:
    """A logged number; one that JSON could not hold was written as text (`nan`, `inf`)."""
    return float(value)


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
    try:
        return RunRecord(
            name=path.resolve().name,
            config=yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")),
            metrics=read_lines(path / "metrics.jsonl"),
            evaluation=json.loads(evaluation.read_text("utf-8")) if evaluation.is_file() else None,
            samples=read_lines(samples) if samples.is_file() else [],
        )
    except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: a file of the run is damaged: {error}") from None


def read_lines(path: Path) -> list[Row]:
    """The objects of a JSON Lines file; a last line that is being written is left out.

    Raises:
        ValueError: a line is no JSON.
    """
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]
