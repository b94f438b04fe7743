"""Read a run's folder: settings, metrics, evaluation, samples, size of the model."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastalign.report.metric_table import MetricTable, Row, number
from fastalign.yaml_file import read_yaml_file

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "embed_out.weight", "score.weight")


@dataclass(frozen=True)
class RunRecord:
    """The files of a run's folder.

    Attributes:
        name: name of the folder.
        config: contents of `config.yaml`.
        metrics: rows of `metrics.jsonl`, one per step.
        evaluation: contents of `eval/eval.json`, or None.
        samples: rows of `eval/samples.jsonl`, or none.
        rollouts: rows of `samples.jsonl`, completions that were sampled while it trained, or none.
        machine: contents of `machine.json`, or empty.
        folder: the folder; None for a record that was made otherwise.
        began: when it began, in ISO 8601; empty if not known.
        num_product_weights: number of weights in `model/` that a token is multiplied by, or None.
    """

    name: str
    config: dict[str, Any]
    metrics: MetricTable
    evaluation: Row | None
    samples: list[Row]
    rollouts: list[Row] = field(default_factory=list)
    machine: Row = field(default_factory=dict)
    folder: Path | None = None
    began: str = ""
    num_product_weights: int | None = None

    @property
    def seconds(self) -> float:
        """Seconds spent in steps."""
        known, values = self.metrics.numbers("step_seconds")
        return math.fsum(values[known].tolist())

    @property
    def collapsed(self) -> bool:
        """True if the run or its evaluation reports a collapse."""
        return is_collapsed(self.evaluation, self.metrics)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a metric was logged, and its values."""
        return self.metrics.series(name)

    def setting(self, name: str) -> Any:
        """Return a setting by its dotted name, or None."""
        value: Any = self.config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def num_steps(self) -> int:
        """The last step that was logged."""
        steps, _ = self.metrics.arrays("step")
        return int(steps.max()) if len(steps) else 0

    @property
    def skipped_steps(self) -> list[int]:
        """The steps that changed no weight."""
        return [step for step, value in zip(*self.series("skipped"), strict=True) if value]

    def measure(self, name: str) -> tuple[float, float] | None:
        """Return a measure of the evaluation and its standard error (NaN if unknown), or None."""
        return finite(self.evaluation or {}, name)

    def last(self, name: str) -> float | None:
        """Return the last finite value of a metric, or None."""
        values = [value for value in self.series(name)[1] if math.isfinite(value)]
        return values[-1] if values else None


def finite(values: Row, name: str) -> tuple[float, float] | None:
    """Return `name` and its standard error `name_se` (NaN if missing); None if it is not finite."""
    value, error = number(values.get(name)), number(values.get(f"{name}_se"))
    if value is None or not math.isfinite(value):
        return None
    return value, math.nan if error is None else error


def is_collapsed(evaluation: Row | None, metrics: MetricTable) -> bool:
    """Return whether `collapsed` is set in the evaluation, or in the last step that logs it.

    It is set by true, a number other than 0, or a reason in words. A policy may recover.
    """
    values = [(evaluation or {}).get("collapsed"), *metrics.logged("collapsed")[-1:]]
    return any(map(is_set, values))


def is_set(value: Any) -> bool:
    """Return whether a value of `collapsed` says so: true, not 0, or a reason in words."""
    return value not in (None, False, 0, "", "0", "0.0", "false")


def best_of_rows(evaluation: Row | None) -> list[Row]:
    """Return the best-of-n rows of an evaluation whose model is its own reference."""
    config = (evaluation or {}).get("config") or {}
    paths = [(config.get(name) or {}).get("path") for name in ("model", "reference")]
    if evaluation is None or paths[0] is None or paths[0] != paths[1]:
        return []
    return list(evaluation.get("best_of_n") or [])


def labels_of(run: RunRecord) -> tuple[str, float | None, int | None]:
    """Return method, strength and seed according to the settings.

    The method is `ppo`, the advantage's name without a value model (`grpo`), the loss's name
    (`online dpo` on fresh pairs), `kto` or `sft`. The strength is the KL coefficient or the loss's
    beta; sft and reward models have none.
    """

    def section(name: str) -> Row:
        value = run.config.get(name)
        return value if isinstance(value, dict) else {}

    seed = section("run").get("seed")
    if "ppo" in run.config:
        advantage = section("ppo").get("advantage")
        name = str(advantage.get("name", "gae")) if isinstance(advantage, dict) else "gae"
        method = "ppo" if name == "gae" else name
        return method, number(section("kl").get("coefficient")), seed
    loss = section("loss")
    method = str(loss.get("name", "kto" if "desirable_weight" in loss else "sft"))
    if "pairs" in run.config:
        method = f"online {method}"
    return method, number(loss.get("beta")), seed


def short_path(text: str) -> str:
    """Return a path as it is or, if it is absolute, its last two parts: the rest is private."""
    parts = Path(text).parts
    return "/".join(parts[-2:]) if text.startswith(("/", "~")) and len(parts) > 2 else text


def read_runs(folders: Sequence[str | Path]) -> list[RunRecord]:
    """Read run folders; runs with the same folder name are named by parent folders too."""
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
    """Read a run's folder.

    Raises:
        ValueError: if a file in it is damaged.
        FileNotFoundError: if it is not a run's folder.
    """
    path = Path(folder)
    for name in ("config.yaml", "metrics.jsonl"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path}: no {name}; expected the folder of a run (--run.dir)")
    evaluation = path / "eval" / "eval.json"
    samples = path / "eval" / "samples.jsonl"
    rollouts = path / "samples.jsonl"
    machine = path / "machine.json"
    began = path / "began.txt"
    try:
        config = read_yaml_file(path / "config.yaml")
        metrics = MetricTable(read_lines(path / "metrics.jsonl"))
        rows = list(read_lines(samples, may_grow=False)) if samples.is_file() else []
        drawn = list(read_rollouts(rollouts)) if rollouts.is_file() else []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: a file of the run is damaged: {error}") from None
    return RunRecord(
        name=path.resolve().name,
        config=config if isinstance(config, dict) else {},
        metrics=metrics,
        evaluation=read_object(evaluation) if evaluation.is_file() else None,
        samples=rows,
        rollouts=drawn,
        machine=read_object(machine) if machine.is_file() else {},
        folder=path.resolve(),
        began=began.read_text(encoding="utf-8").strip() if began.is_file() else "",
        num_product_weights=num_product_weights(path / "model"),
    )


def read_object(file: Path) -> Row:
    """Return a file's JSON object, such as the measures that `fastalign eval` wrote.

    Raises:
        ValueError: if the file is not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: a file of the run is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def read_lines(path: Path, *, may_grow: bool = True) -> Iterator[Row]:
    """Yield the objects of a JSON Lines file.

    With `may_grow` a last, unfinished line is left out, which a run may be writing.

    Raises:
        ValueError: if a line is not a JSON object.
    """
    place = 0
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            if not line.strip() or (may_grow and not line.endswith("\n")):
                continue
            row, place = json.loads(line), place + 1
            if not isinstance(row, dict):
                raise ValueError(f"{path}: object {place}: expected a JSON object, got {row!r:.60}")
            yield row


def read_rollouts(path: Path) -> Iterator[Row]:
    """Yield the rows of a run's `samples.jsonl`.

    Raises:
        ValueError: if a row has no step, prompt or completion.
    """
    for place, row in enumerate(read_lines(path), 1):
        prompt = row.get("prompt")
        turns = prompt if isinstance(prompt, list) else []
        is_prompt = isinstance(prompt, str) or bool(turns)
        is_prompt &= all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns)
        if not (is_prompt and type(row.get("step")) is int and type(row.get("completion")) is str):
            raise ValueError(f"{path}: object {place}: expected step, prompt and completion")
        yield row


def num_product_weights(folder: Path) -> int | None:
    """Return the number of a saved model's weights that a token is multiplied by; None if absent.

    Input embeddings that are not tied to the head are looked up, not multiplied.

    Raises:
        ValueError: if a file is damaged.
    """
    sizes: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()
                sizes |= {name: math.prod(tensors.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{file}: a file of the run is damaged: {error}") from None
    if any(name.endswith(HEADS) for name in sizes):
        sizes = {name: size for name, size in sizes.items() if not name.endswith(EMBEDDINGS)}
    return sum(sizes.values()) or None
