"""The lines that a run prints on evaluations and at its end: numbers, and what to type next."""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastalign.progress import duration
from fastalign.report.metric_table import number
from fastalign.report.runs import read_lines

HELD_OUT = "eval_"  # begins the names of metrics of held-out data
# Metrics that these lines have, by their words.
SHOWN = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "accuracy": "accuracy",
    "rewards/margins": "margin",
    "margin": "margin",
    "mean_token_accuracy": "token accuracy",
    "reward": "reward",
    "objective/kl": "KL",
    "entropy": "entropy",
    "completions/mean_length": "tokens per answer",
}


@dataclass(frozen=True)
class EndOfRun:
    """Facts about a run that ends.

    Attributes:
        command: the training command, such as dpo.
        folder: the run's folder.
        part: the part of it that holds the model to go on with, `model` or `adapter`.
        finished: whether all steps are taken.
        base: path or hub name of the model that it trained.
        reference: that of its reference; the base where it has none of its own.
        train: its training data.
        held_out: its held-out data, or None.
        samples: whether it sampled, so that its data are prompts.
        sampling: settings of its samples that are not the defaults, by their flags.
        typed: whether it can be gone on with on the command line.
    """

    command: str
    folder: Path
    part: str
    finished: bool
    base: str
    reference: str
    train: str
    held_out: str | None
    samples: bool = False
    sampling: Mapping[str, str] = field(default_factory=dict)
    typed: bool = True

    @property
    def model(self) -> str:
        """Folder of the model."""
        return str(self.folder / self.part)


def held_out_line(metrics: Mapping[str, Any]) -> str:
    """Return `step 100, held-out: loss 0.61, accuracy 0.71`; empty if nothing was evaluated."""
    found = [
        f"{words} {shown_number(value)}"
        for name, words in SHOWN.items()
        if (value := number(metrics.get(f"{HELD_OUT}{name}"))) is not None
    ]
    return f"step {metrics['step']}, held-out: {', '.join(found)}" if found else ""


def end_of_run(facts: EndOfRun, metrics: Path) -> list[str]:
    """Return lines on a run and its `metrics.jsonl`: first and last numbers, and commands."""
    try:
        lines = numbers_of_run(read_lines(metrics))
    except (OSError, ValueError):  # the run is worth more than its numbers
        lines = [f"{metrics} could not be read"]
    commands = [f"  {command}" for command in next_commands(facts)] if facts.typed else []
    return [*lines, *(["next:", *commands] if commands else [])]


def numbers_of_run(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line on steps, time and tokens, and one for each of SHOWN, held-out ones first."""
    first: dict[str, tuple[int, float]] = {}
    last: dict[str, tuple[int, float]] = {}
    seconds, steps, num_tokens = 0.0, 0, 0
    names = [prefix + name for prefix in (HELD_OUT, "") for name in SHOWN]
    for row in rows:
        steps, num_tokens = row.get("step", steps), row.get("num_tokens", num_tokens)
        seconds += number(row.get("step_seconds")) or 0.0
        for name in names:
            value = number(row.get(name))
            if value is not None:
                first.setdefault(name, (steps, value))
                last[name] = steps, value
    lines = [f"{steps} steps in {duration(seconds)}, {num_tokens:,} tokens"] if steps else []
    for name in names:
        if name not in last:
            continue
        words = SHOWN[name.removeprefix(HELD_OUT)]
        words = f"held-out {words}" if name.startswith(HELD_OUT) else words
        ends = [first[name], last[name]] if first[name][0] != last[name][0] else [last[name]]
        shown = " -> ".join(f"{shown_number(value)} (step {step})" for step, value in ends)
        lines.append(f"  {words:<26} {shown}")
    return lines


def shown_number(value: float) -> str:
    """Return a number with four digits."""
    return f"{value:.4g}"


def next_commands(facts: EndOfRun) -> list[str]:
    """Return command lines to type next: to go on with a run that is not finished, else to use it.

    Files that the run does not know have plain names, such as `pairs.jsonl`.
    """
    folder, model = facts.folder, facts.model
    if not facts.finished:
        flags = {"config": str(folder / "config.yaml"), "run.resume": None}
        return [command_line(facts.command, flags)]
    report = command_line(
        f"report {shlex.quote(str(folder))}", {"out": str(folder / "report.html")}
    )
    if facts.command == "sft":
        name, flags = "dpo", {"data.train": "pairs.jsonl", "run.dir": "runs/dpo"}
    elif facts.command == "reward":
        name = "ppo"
        flags = {"data.train": "prompts.jsonl", "reward.sources": model, "run.dir": "runs/ppo"}
        model = facts.base  # the policy
    elif facts.command == "dpo" and facts.held_out is not None:
        name, out = "eval", str(folder / "eval" / "eval.json")
        flags = {"reference.path": facts.reference, "data.pairs": facts.held_out, "out": out}
    else:
        prompts = (facts.held_out or facts.train) if facts.samples else "prompts.jsonl"
        name = "generate"
        out = str(folder / "generated.jsonl")
        flags = {"data.prompts": prompts, **facts.sampling, "out": out}
    return [report, command_line(name, {"model.path": model, **flags})]


def command_line(name: str, flags: Mapping[str, str | None]) -> str:
    """Return a command of fastalign with its flags, as a shell takes it; None: without a value."""
    words = [
        f"--{flag}" if value is None else f"--{flag} {shlex.quote(value)}"
        for flag, value in flags.items()
    ]
    return " ".join(["fastalign", name, *words])
