"""Measure reward against KL of every method at several strengths and seeds from one SFT model.

`./scripts/frontier.sh` calls it. An interrupted call can be repeated: finished runs are skipped.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "scripts" / "recipes" / "frontier"
SAMPLES = ROOT / "fastalign" / "samples" / "pros_cons"


@dataclass(frozen=True)
class Job:
    """One run and its evaluation.

    Attributes:
        folder: folder of the run.
        commands: arguments of successive `fastalign` commands.
        result: file that exists when the job is done.
    """

    folder: Path
    commands: tuple[tuple[str, ...], ...]
    result: Path


@dataclass(frozen=True)
class LabelledJob:
    """A job and the labels of its points: method, strength, seed."""

    job: Job
    labels: list[dict[str, Any]]


def use_one_thread() -> None:
    """Limit libraries, which read this on import, to the one core of each worker."""
    os.environ["OMP_NUM_THREADS"] = "1"


def execute(job: Job) -> tuple[Job, float, str | None]:
    """Run a job's commands; return the job, its seconds, and the error or None."""
    from fastalign.cli.main import main

    start = time.perf_counter()
    finished = (job.folder / "model").exists()  # and the evaluation was interrupted
    if not finished and (job.folder / "config.yaml").exists():  # the run was interrupted
        shutil.rmtree(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    log = job.folder / "log.txt"
    with (
        log.open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        for command in job.commands[finished:]:
            print("$ fastalign", *command, flush=True)
            if main(command):
                last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
                return job, time.perf_counter() - start, last
    return job, time.perf_counter() - start, None


def run_all(jobs: Sequence[Job], num_workers: int) -> None:
    """Run the unfinished jobs, `num_workers` at a time.

    Raises:
        SystemExit: if a job failed, after all others have run.
    """
    waiting = [job for job in jobs if not job.result.exists()]
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them already finished", flush=True)
    failed = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=use_one_thread) as pool:
        for count, future in enumerate(as_completed(pool.submit(execute, j) for j in waiting), 1):
            job, seconds, fault = future.result()
            print(
                f"{count}/{len(waiting)}  {job.folder}  {seconds:.0f} s  {fault or ''}", flush=True
            )
            if fault is not None:
                failed.append(job.folder)
    if failed:
        sys.exit(
            f"frontier: {len(failed)} runs failed; see log.txt in {', '.join(map(str, failed))}"
        )


def write_preferred(pairs: Path, out: Path) -> None:
    """Write the preferred answer of each pair without a tie as a demonstration."""
    lines = []
    for line in filter(str.strip, pairs.read_text(encoding="utf-8").split("\n")):
        row = json.loads(line)
        if row["label"] != "tie":
            completion = row[f"response_{row['label']}"]
            lines.append(json.dumps({"prompt": row["prompt"], "completion": completion}) + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(lines), encoding="utf-8")


def evaluation(model: Path, run: Path, folder: Path, seed: int, *more: str) -> tuple[str, ...]:
    """Return the command that evaluates a model against the SFT model."""
    return (
        *("eval", "--model.path", str(model), "--reference.path", str(folder / "sft" / "model")),
        *("--reward", str(SAMPLES / "reward.json"), "--sampling.max-new-tokens", "40"),
        *("--data.prompts", str(SAMPLES / "prompts_eval.jsonl"), "--run.seed", str(seed)),
        *("--out", str(run / "eval" / "eval.json"), "--overwrite", *more),
    )


def shared_jobs(folder: Path, quick: bool) -> list[Job]:
    """Return the jobs of the SFT model and of the reward models that start from it."""
    base, sft, reward = folder / "base", folder / "sft", folder / "reward"
    adapter = folder / "reward-adapter"
    texts = ("--data.train", str(SAMPLES / "texts_train.jsonl.gz"))
    shape = ("--vocab-size", "768", "--hidden-size", "128", "--layers", "4", "--heads", "4")
    begin = (
        "new-model",
        *texts,
        *shape,
        "--max-positions",
        "256",
        "--overwrite",
        "--out",
        str(base),
    )
    tune = (
        *("sft", "--config", str(RECIPES / "sft.yaml"), "--model.path", str(base), *texts),
        *("--train.max-steps", "400" if quick else "1000", "--run.dir", str(sft)),
    )
    pairs = ("--data.train", str(SAMPLES / "pairs_train.jsonl"))
    pairs += ("--data.eval", str(SAMPLES / "pairs_eval.jsonl"))
    learn, adapt = (
        (
            *("reward", "--config", str(RECIPES / config), "--model.path", str(sft / "model")),
            *("--run.dir", str(run), *pairs),
        )
        for run, config in ((reward, "reward.yaml"), (adapter, "reward-adapter.yaml"))
    )
    return [
        Job(sft, (begin, tune), sft / "model"),
        Job(reward, (learn,), reward / "model"),
        Job(adapter, (adapt,), adapter / "model"),
    ]


def method_jobs(experiment: dict[str, Any], folder: Path, quick: bool) -> Iterator[LabelledJob]:
    """Yield the runs of the experiment's methods, and the best of n of the SFT model."""
    sft, reward = folder / "sft" / "model", folder / "reward" / "model"
    made = {
        "reward": reward,
        "adapter": folder / "reward-adapter" / "adapter",
        "truth": SAMPLES / "reward.json",
        "pairs": SAMPLES / "pairs_train.jsonl",
        "prompts": SAMPLES / "prompts_train.jsonl",
        "preferred": folder / "preferred.jsonl",
        "cache": folder / "cache",
    }
    seeds = experiment["quick_seeds" if quick else "seeds"]
    best = ("--best-of", *map(str, experiment["best_of"]), "--best-of-reward", str(reward))
    for seed in seeds:
        run = folder / "runs" / "best-of-n" / f"seed-{seed}"
        job = Job(run, (evaluation(sft, run, folder, seed, *best),), run / "eval" / "eval.json")
        labels = [{"method": "sft", "seed": seed}]
        labels += [
            {"method": "best of n, learned reward", "strength": n, "seed": seed, "best_of": n}
            for n in experiment["best_of"]
        ]
        yield LabelledJob(job, labels)
    for method in experiment["methods"]:
        places = experiment["quick_values"] if quick else range(len(method["values"]))
        for value, seed in ((method["values"][place], seed) for place in places for seed in seeds):
            name = method["name"].replace(",", "").replace(" ", "-")
            run = folder / "runs" / name / str(value) / f"seed-{seed}"
            train = (
                *(method["command"], "--config", str(RECIPES / method["config"])),
                *("--model.path", str(sft), "--run.dir", str(run), "--run.seed", str(seed)),
                *(method["flag"], str(value), *(word.format(**made) for word in method["more"])),
            )
            commands = (train, evaluation(run / "model", run, folder, seed))
            job = Job(run, commands, run / "eval" / "eval.json")
            labels = [{"method": method["name"], "strength": value, "seed": seed}]
            yield LabelledJob(job, labels)


def mark_folder(folder: Path, parser: argparse.ArgumentParser) -> None:
    """Leave a mark in the experiment's folder; end if it holds something else."""
    mark = folder / ".frontier"
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        parser.error(f"{folder} exists, and this script did not make it; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()


def main() -> None:
    """Run the experiment in a folder and draw its frontier."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write everything to")
    parser.add_argument("--quick", action="store_true", help="run two strengths and one seed only")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="number of simultaneous runs"
    )
    options = parser.parse_args()
    folder: Path = options.folder
    mark_folder(folder, parser)
    experiment = yaml.safe_load((RECIPES / "experiment.yaml").read_text(encoding="utf-8"))
    begin = time.perf_counter()
    write_preferred(SAMPLES / "pairs_train.jsonl", folder / "preferred.jsonl")
    for job in shared_jobs(folder, options.quick):
        run_all([job], 1)
    labelled = list(method_jobs(experiment, folder, options.quick))
    run_all([each.job for each in labelled], options.workers)
    entries = [
        {**labels, "run": str(each.job.folder.relative_to(folder))}
        for each in labelled
        for labels in each.labels
    ]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "runs.jsonl").write_text(text, encoding="utf-8")
    from fastalign.cli.main import main as fastalign

    for name in ("frontier.html", "frontier.png"):
        out = ["--out", str(folder / name), "--overwrite"]
        if fastalign(["frontier", str(folder / "runs.jsonl"), *out]):
            sys.exit(2)
    print(f"Finished in {time.perf_counter() - begin:.0f} seconds.")


if __name__ == "__main__":
    main()
