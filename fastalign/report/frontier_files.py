"""Runs for the frontier, from folders, from `eval.json` files, and from lists with labels."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastalign.report.frontier import FrontierRun, Strength
from fastalign.report.runs import (
    Row,
    best_of_rows,
    finite,
    is_collapsed,
    labels_of,
    read_lines,
    read_object,
    read_run,
)

ENTRY_KEYS = ("method", "strength", "seed", "run", "best_of", "collapsed")


def read_frontier(sources: Sequence[str | Path]) -> list[FrontierRun]:
    """Runs of folders, of `eval.json` files in them, and of lists (.yaml, .json, .jsonl).

    Raises:
        ValueError: a damaged file, an entry without its labels, or a run that is there twice.
        FileNotFoundError: a file or a run's evaluation is missing.
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
    """What a file holds: a list of entries, or the mapping of an `eval.json`.

    Raises:
        ValueError: neither, or damaged.
    """
    try:
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            content: Any = [json.loads(line) for line in lines if line.strip()]
        elif path.suffix in (".yaml", ".yml"):
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    is_evaluation = isinstance(content, dict) and ("reward" in content or "kl" in content)
    if not is_evaluation and not isinstance(content, list):
        raise ValueError(
            f"{path}: expected a list of runs (method, strength, seed, run) or an eval.json, got "
            f"{type(content).__name__}"
        )
    return content


def from_folder(folder: Path, evaluation_file: Path | None) -> Iterator[FrontierRun]:
    """A run labelled by its config.yaml; of the reference itself, its best of n as well.

    Raises:
        ValueError: damaged files, or a method that needs a strength and has none.
        FileNotFoundError: no run, or no evaluation there.
    """
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
    """A run labelled by hand; `run` is its folder or its `eval.json`, relative to the list.

    Raises:
        ValueError: an unknown or missing key, or a value of the wrong kind.
        FileNotFoundError: no evaluation there.
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
    metrics = read_lines(home / "metrics.jsonl") if (home / "metrics.jsonl").is_file() else []
    evaluation = read_object(file) if file.is_file() else None
    collapsed = bool(entry.get("collapsed")) or is_collapsed(evaluation, metrics)
    if evaluation is None and not collapsed:
        raise FileNotFoundError(f"{where}: no {file}; evaluate the run with `fastalign eval`")
    labels = (entry["method"], as_strength(entry.get("strength")), entry.get("seed"))
    return measured(f"{where} ({path})", labels, evaluation, collapsed, entry.get("best_of"))


def as_strength(value: Any) -> Strength:
    """A number where it is one: YAML reads `1e-3` as text."""
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
    """The run with its measures, or those of its best of n.

    Raises:
        ValueError: the evaluation has no such best of n.
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
