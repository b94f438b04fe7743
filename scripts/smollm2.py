"""Align SmolLM2-135M-Instruct on real data: single-turn dialogue, or summaries of meetings.

`./scripts/smollm2.sh` calls it. It prints each `fastalign` command before it runs it, skips what an
earlier call has finished, and writes a page of the results on held-out prompts to FOLDER/TASK.md.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fetch_sample_model import default_folder, fetch

from fastalign.evaluation.statistics import Estimate, estimate_of_groups

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "scripts" / "recipes" / "smollm2"
SHOWN_PROMPTS = 3
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Limits of what is read, trained and sampled.

    Attributes:
        train: most training rows.
        held_out: most held-out rows, and prompts to evaluate on.
        characters: most characters of a row.
        samples: answers to each held-out prompt.
        flags: flags of every training run, for a trial.
        sampled: further flags of runs that sample.
    """

    train: int
    held_out: int
    characters: int
    samples: int
    flags: tuple[str, ...] = ()
    sampled: tuple[str, ...] = ()


SHORT = ("--train.max-steps", "2", "--train.batch-size", "4")
QUICK = Size(8, 3, 500, 2, SHORT, ("--sampling.max-new-tokens", "8"))
MAX_NEW_TOKENS = "96"


@dataclass(frozen=True)
class Step:
    """A `fastalign` command, and the file or folder that exists when it is done."""

    arguments: tuple[str, ...]
    result: Path


def message(role: str, text: str) -> list[dict[str, str]]:
    """Return a conversation of one message."""
    return [{"role": role, "content": text.strip()}]


def read(file: Path) -> list[Row]:
    """Return the rows of a file of JSON Lines."""
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in filter(str.strip, lines)]


def write(file: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON Lines; raise ValueError if an earlier call wrote others there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{file} is of other data or of --quick; name another folder")
    file.write_text(text, encoding="utf-8")


def dialogue_rows(data: Path) -> Iterator[tuple[str, Row]]:
    """Yield each single-turn comparison with the text that decides its side of the split."""
    for row in read(data / "oasst_100.jsonl"):
        if len(row["prompt"]) == 1:
            yield (
                row["prompt"][0]["content"],
                {
                    "prompt": row["prompt"],
                    "response_a": row["chosen"],
                    "response_b": row["rejected"],
                    "label": "a",
                },
            )
    for row in read(data / "pandalm_human.jsonl"):
        sides = {
            side: message("assistant", row[side])
            for side in ("response_a", "response_b")
            if row[side].strip()
        }
        if len(sides) == 2:
            prompt = message("user", row["prompt"])
            yield row["prompt"], {"prompt": prompt, **sides, "label": row["label"]}


def summary_rows(data: Path) -> Iterator[tuple[str, Row]]:
    """Yield each passage with its summary, also as a column for the reward, and its meeting."""
    for row in read(data / "qmsum.jsonl"):
        yield (
            row["meeting"],
            {
                "prompt": message("user", row["prompt"]),
                "completion": message("assistant", row["completion"]),
                "summary": row["completion"].strip(),
            },
        )


def digest(text: str) -> bytes:
    """Return a hash, by which rows are in an order that no seed or file decides."""
    return hashlib.sha256(text.encode()).digest()


def split(rows: Iterator[tuple[str, Row]], size: Size) -> tuple[list[Row], list[Row]]:
    """Return training and held-out rows: what has one key (a prompt, a meeting) is on one side."""
    short = [(key, row) for key, row in rows if len(json.dumps(row)) <= size.characters]
    short.sort(key=lambda pair: digest(json.dumps(pair[1])))
    kept: set[str] = set()  # keys of at least a fifth of the rows
    for key in sorted({key for key, _ in short}, key=digest):
        if 5 * sum(key in kept for key, _ in short) < len(short):
            kept.add(key)
    train = [row for key, row in short if key not in kept][: size.train]
    held_out = [row for key, row in short if key in kept][: size.held_out]
    if not train:
        raise ValueError(f"data: expected several prompts or meetings, got {len(kept)}")
    return train, held_out


def prompts_of(rows: Sequence[Row]) -> list[Row]:
    """Return the distinct prompts, with the summary where there is one."""
    keys = ("prompt", "summary")
    found = {json.dumps(row["prompt"]): {k: row[k] for k in keys if k in row} for row in rows}
    return list(found.values())


def prepare(task: "Task", data: Path, folder: Path, size: Size) -> None:
    """Write the task's files of rows and of prompts, training and held out."""
    for name, rows in zip(("train", "eval"), split(task.rows(data), size), strict=True):
        write(folder / "data" / f"{name}.jsonl", rows)
        write(folder / "data" / f"prompts_{name}.jsonl", prompts_of(rows))
        print(f"{name}: {len(rows)} rows, {len(prompts_of(rows))} prompts")


def training(
    folder: Path, name: str, command: str, config: str, start: Path, *more: str
) -> tuple[str, ...]:
    """Return the command of a training run."""
    return (
        *(command, "--config", str(RECIPES / f"{config}.yaml"), "--model.path", str(start)),
        *("--run.dir", str(folder / name), *more),
    )


def evaluation(
    folder: Path, name: str, model: Path, reference: Path, size: Size, reward: str, *more: str
) -> Step:
    """Return the step that evaluates a model on the held-out prompts.

    `more` names what a model is compared on with its reference, not the reference with itself.
    """
    out = folder / "evaluated" / name / "eval.json"
    arguments = (
        *("eval", "--model.path", str(model), "--reference.path", str(reference)),
        *("--data.prompts", str(folder / "data" / "prompts_eval.jsonl"), "--reward", reward),
        *("--sampling.num-samples", str(size.samples), "--out", str(out), "--overwrite"),
        *("--sampling.max-new-tokens", MAX_NEW_TOKENS, *size.sampled),
        *(() if model == reference else more),
    )
    return Step(arguments, out)


def dialogue_steps(folder: Path, base: Path, size: Size) -> Iterator[Step]:
    """Yield DPO, the reward model, GRPO under it, and the evaluation of each against the start."""
    train, held_out = (str(folder / "data" / f"{name}.jsonl") for name in ("train", "eval"))
    prompts, reward = str(folder / "data" / "prompts_train.jsonl"), folder / "reward" / "model"
    pairs = ("--data.train", train, "--data.eval", held_out, *size.flags)
    yield Step(training(folder, "reward", "reward", "reward", base, *pairs), reward)
    cache = ("--reference.cache-dir", str(folder / "cache"))
    dpo = training(folder, "dpo", "dpo", "dpo", base, *pairs, *cache)
    yield Step(dpo, folder / "dpo" / "model")
    sampled = ("--data.train", prompts, "--reward.sources", str(reward))
    flags = (*sampled, *size.flags, *size.sampled)
    grpo = training(folder, "grpo", "ppo", "grpo-dialogue", base, *flags)
    yield Step(grpo, folder / "grpo" / "model")
    for name in ("start", "dpo", "grpo"):
        model = base if name == "start" else folder / name / "model"
        also = ("--data.pairs", held_out, "--data.max-length", "2048")
        yield evaluation(folder, name, model, base, size, str(reward), *also)


def summary_steps(folder: Path, base: Path, size: Size) -> Iterator[Step]:
    """Yield fine-tuning, GRPO and online DPO from it, and the evaluation of each against it."""
    train, prompts = (str(folder / "data" / f"{name}.jsonl") for name in ("train", "prompts_train"))
    tuned, reward = folder / "sft" / "model", "smollm2_rewards:rouge_l"
    held_out = ("--data.eval", str(folder / "data" / "eval.jsonl"))
    sft = ("--data.train", train, *held_out, *size.flags)
    yield Step(training(folder, "sft", "sft", "sft", base, *sft), tuned)
    flags = ("--data.train", prompts, "--reward.sources", reward, *size.flags, *size.sampled)
    grpo = training(folder, "grpo", "ppo", "grpo-summaries", tuned, *flags)
    yield Step(grpo, folder / "grpo" / "model")
    online = training(folder, "online-dpo", "online-dpo", "online-dpo", tuned, *flags)
    yield Step(online, folder / "online-dpo" / "model")
    for name in ("start", "sft", "grpo", "online-dpo"):
        model = base if name == "start" else folder / name / "model"
        yield evaluation(folder, name, model, tuned, size, reward)


@dataclass(frozen=True)
class Task:
    """A recipe.

    Attributes:
        title: heading of its page.
        rows: reads its data.
        steps: its commands.
        reward: name of the reward in the table.
        baseline: evaluated model that win rates and the KL refer to.
        whole: its size, for about 40 minutes on two cores with AVX2 alone, less on newer ones.
        quick: its size with `--quick`.
    """

    title: str
    rows: Callable[[Path], Iterator[tuple[str, Row]]]
    steps: Callable[[Path, Path, Size], Iterator[Step]]
    reward: str
    baseline: str
    whole: Size
    quick: Size


TASKS = {
    "dialogue": Task(
        "Single-turn dialogue",
        dialogue_rows,
        dialogue_steps,
        reward="reward",
        baseline="start",
        # Answers of the length that is sampled: most of the longer ones would be cut.
        whole=Size(train=400, held_out=80, characters=1000, samples=2),
        quick=QUICK,
    ),
    "summaries": Task(
        "Summaries of meetings",
        summary_rows,
        summary_steps,
        reward="ROUGE-L",
        baseline="sft",
        whole=Size(train=400, held_out=80, characters=3000, samples=3),
        quick=replace(QUICK, characters=2200),
    ),
}


def run(step: Step) -> None:
    """Run a command; end with its exit code if it fails."""
    print("\n$ fastalign", *step.arguments, flush=True)
    path = os.pathsep.join(filter(None, [str(ROOT / "scripts"), os.environ.get("PYTHONPATH")]))
    called = [sys.executable, "-m", "fastalign", *step.arguments]
    code = subprocess.run(called, env={**os.environ, "PYTHONPATH": path}).returncode
    if code:
        sys.exit(code)


def by_prompt(samples: Sequence[Row], value: Callable[[Row], float]) -> dict[str, list[float]]:
    """Return a value of each sample, in the samples' order, by prompt."""
    found: dict[str, list[float]] = {}
    for row in samples:
        found.setdefault(json.dumps(row["prompt"]), []).append(value(row))
    return found


def wins(samples: Sequence[Row], baseline: Sequence[Row]) -> Estimate:
    """Return the share of rewards above the baseline's k-th on the same prompt; ties count half."""
    ours, theirs = (by_prompt(rows, lambda row: row["reward"]) for rows in (samples, baseline))
    return estimate_of_groups(
        [
            [(a > b) + (a == b) / 2 for a, b in zip(values, theirs[prompt], strict=True)]
            for prompt, values in ours.items()
        ]
    )


def repeated(row: Row) -> float:
    """Return the share of an answer's runs of four words that it has had before."""
    words = row["completion"].split()
    runs = [tuple(words[place : place + 4]) for place in range(len(words) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def shown(mean: float, error: float, digits: int = 2) -> str:
    """Return a mean with its standard error."""
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def table(task: Task, folder: Path, names: Sequence[str]) -> list[str]:
    """Return the lines of the table of all evaluated models."""
    head = ["model", task.reward, f"wins against `{task.baseline}`", "KL (nats)", "tokens"]
    head += ["unfinished", "repeated runs of four words", "accuracy on pairs"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    baseline = read(folder / "evaluated" / task.baseline / "samples.jsonl")
    for name in names:
        place = folder / "evaluated" / name
        found = json.loads((place / "eval.json").read_text(encoding="utf-8"))
        samples = read(place / "samples.jsonl")
        won = wins(samples, baseline)
        runs = estimate_of_groups(list(by_prompt(samples, repeated).values()))
        same = name == task.baseline
        cells = [
            shown(found["reward"], found["reward_se"], 3),
            "" if same else shown(won.mean, won.standard_error),
            "0" if same else shown(found["kl"], found["kl_se"]),
            shown(found["completion_tokens"], found["completion_tokens_se"], 1),
            f"{found['share_unfinished']:.2f}",
            shown(runs.mean, runs.standard_error, 3),
            shown(found["accuracy"], found["accuracy_se"])
            if "accuracy" in found and not same
            else "",
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def reward_model_line(folder: Path) -> list[str]:
    """Return a line on the reward model, if the task trained one."""
    file = folder / "reward" / "eval" / "eval.json"
    if not file.exists():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    values = [
        f"{label} {shown(found[name], found[f'{name}_se'])}"
        for label, name in (
            ("accuracy", "accuracy"),
            ("the longer answer", "longer_wins_accuracy"),
            ("log-likelihood with ties", "log_likelihood"),
        )
    ]
    return [f"The reward model on held-out pairs: {', '.join(values)}.", ""]


def answers(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """Yield lines with the first answer of each model to the first prompts."""
    files = {name: read(folder / "evaluated" / name / "samples.jsonl") for name in names}
    prompts = list(dict.fromkeys(json.dumps(row["prompt"]) for row in files[names[0]]))
    for prompt in prompts[:SHOWN_PROMPTS]:
        text = json.loads(prompt)[-1]["content"]
        yield f"**{' '.join(text.split())[-300:]}**"
        yield ""
        for name, rows in files.items():
            first = next(row for row in rows if json.dumps(row["prompt"]) == prompt)
            answer = " ".join(first["completion"].split())
            yield f"- `{name}` ({first['reward']:.2f}): {answer}"
        yield ""


def page(task: Task, command: str, folder: Path, models: Sequence[str], size: Size) -> str:
    """Return the page of a task's results, which the command wrote."""
    num = {kind: len(read(folder / "data" / f"{kind}.jsonl")) for kind in ("train", "eval")}
    prompts = len(read(folder / "data" / "prompts_eval.jsonl"))
    lines = [
        f"## {task.title}",
        "",
        f"Written by `{command}`: {num['train']} training rows, "
        f"{num['eval']} held out; {size.samples} answers at temperature 1 to each of {prompts} "
        "held-out prompts. Errors are standard errors over prompts; the KL is to "
        f"`{task.baseline}`, in nats an answer.",
        "",
        *table(task, folder, models),
        "",
        *reward_model_line(folder),
        "First answers to the first held-out prompts, with their rewards:",
        "",
        *answers(folder, models),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Run a task and write its page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("folder", nargs="?", type=Path, help="folder to write everything to")
    parser.add_argument("--data", type=Path, default=RECIPES / "data", help="folder of the data")
    parser.add_argument("--quick", action="store_true", help="show that it runs, with few rows")
    parser.add_argument("--vllm", action="store_true", help="draw all answers with vLLM's engine")
    options = parser.parse_intermixed_args()
    task = TASKS[options.task]
    size = task.quick if options.quick else task.whole
    flags = "".join(f" --{name}" for name in ("quick", "vllm") if getattr(options, name))
    if options.vllm:
        size = replace(size, sampled=(*size.sampled, "--sampler", "vllm"))
    default = ROOT / "runs" / f"smollm2{'-quick' if options.quick else ''}"
    folder = (options.folder or default) / options.task
    begin, base = time.perf_counter(), default_folder()
    try:
        fetch(base)
        prepare(task, options.data, folder, size)
    except (ValueError, OSError) as error:
        parser.exit(2, f"smollm2: {error}\n")
    steps = list(task.steps(folder, base, size))
    for step in steps:
        start = time.perf_counter()
        if not step.result.exists():
            run(step)
            print(f"{time.perf_counter() - start:.0f} s", flush=True)
    models = [step.result.parent.name for step in steps if step.result.name == "eval.json"]
    out = folder / "page.md"
    command = f"./scripts/smollm2.sh {options.task}{flags}"
    out.write_text(page(task, command, folder, models, size), encoding="utf-8")
    print(f"written to {out}\nFinished in {time.perf_counter() - begin:.0f} seconds.")


if __name__ == "__main__":
    main()
