"""Compare optimiser steps: write the cases, check that losses agree, time the trainers."""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.step_cases import (
    CASES,
    DEFAULT_CASES,
    DEFAULT_PAIRS,
    DEFAULT_SHAPES,
    SHAPES,
    ModelShape,
    make_groups,
    read_groups,
    write_model,
    write_rows,
)
from benchmarks.step_rows import (
    StepRow,
    Turns,
    print_like_for_like,
    print_notes,
    print_steps,
    rows_of,
)
from benchmarks.step_trainers import TRAINERS, fastalign_answers
from benchmarks.step_work import (
    TRUTHS,
    eager_sft,
    run_step_products,
    run_step_products_without_head,
)
from benchmarks.step_worker import WARM_UP_TURNS, Job, Trainer, Worker
from fastalign.batch.packed import Group

ANSWERS = "answers-step"
NAMES = (*TRAINERS, ANSWERS)
NUM_ANSWERS = (2, 4, 8)
PEER, OURS = "trl", "fastalign"
PRODUCTS = "products"
# |loss - eager loss| / |eager loss| of the first step; the eager loss is float32.
AGREEMENT = {"float32": 1e-4, "bfloat16": 2e-2}


def wanted_trainers(trainers: Mapping[str, Trainer], peers: list[str] | None) -> dict[str, Trainer]:
    """Return our trainers and the peers that are asked for; None: all."""
    return {
        name: trainer
        for name, trainer in trainers.items()
        if name.startswith(OURS) or peers is None or name in peers
    }


def usable_trainers(name: str) -> dict[str, Trainer]:
    """Return the trainers whose package is installed."""
    if importlib.util.find_spec("trl") is not None:
        return dict(TRAINERS[name])
    print("without trl: it is not installed")
    return {key: one for key, one in TRAINERS[name].items() if not key.startswith(PEER)}


def make_job(
    name: str,
    shape: ModelShape,
    groups: list[Group],
    folder: Path,
    arguments: argparse.Namespace,
    weights: Path | None = None,
) -> Job:
    """Write the models and rows of a comparison and return its job."""
    reward = name == "reward-step"
    write_model(shape, folder / "policy", 0, reward=reward, weights=weights)
    if name == "dpo-step":  # random, so that the first loss says more than log 2
        write_model(shape, folder / "reference", 1)
    kind = "preference" if name in ("dpo-step", "reward-step") else "sft"
    write_rows(groups, folder / "rows.jsonl", kind)
    return job_in(folder, shape, groups, arguments)


def job_in(
    folder: Path, shape: ModelShape, groups: list[Group], arguments: argparse.Namespace
) -> Job:
    """Return the job of a folder that holds the models and rows."""
    return Job(
        policy=folder / "policy",
        reference=folder / "reference",
        rows=folder / "rows.jsonl",
        groups=groups,
        shape=shape,
        scratch=folder,
        device=arguments.device,
        dtype=arguments.dtype[0],
        num_steps=arguments.rounds + WARM_UP_TURNS + 1,
        num_threads=torch.get_num_threads(),
    )


def disagreement(implementation: str, loss: float, truth: float, tolerance: float) -> str | None:
    """Return how a loss differs from the eager one, or None; exit if it is ours."""
    error = abs(loss - truth) / abs(truth)
    if error <= tolerance:
        return None
    message = (
        f"the loss of {implementation} is {loss:.6f}, the eager one {truth:.6f} "
        f"(relative difference {error:.1e})"
    )
    if implementation.startswith(OURS):
        raise SystemExit(message)
    return message


def measure_turns(
    contestants: Mapping[str, tuple[Trainer, Job]],
    truths: Mapping[str, tuple[float, float]],
    num_rounds: int,
) -> dict[str, Turns]:
    """Start a process for each contestant, stop those with a wrong loss, and time the others.

    Args:
        contestants: trainer and job by name.
        truths: eager loss and relative tolerance by name; a contestant without one is not checked.
        num_rounds: number of timed turns of each contestant.
    """
    workers: dict[str, Worker] = {}
    turns: dict[str, Turns] = {}
    try:
        for name, (trainer, job) in contestants.items():
            _say(f"{name} ...")
            scratch = Path(tempfile.mkdtemp(dir=job.scratch))
            workers[name] = Worker(name, trainer, replace(job, scratch=scratch))
            turns[name] = Turns(job, workers[name].loss, workers[name].num_tokens)
            if name in truths:
                fault = disagreement(name, turns[name].loss, *truths[name])
                if fault is not None:
                    print(f"not timed: {fault}")
                    workers.pop(name).stop()
                    del turns[name]
        for number in range(num_rounds):
            _say(f"round {number + 1} of {num_rounds}")
            for name, worker in workers.items():
                seconds, turns[name].peak_bytes = worker.turn()
                turns[name].seconds.append(seconds)
    finally:
        for worker in workers.values():
            worker.stop()
    return turns


def compare_case(
    name: str, job: Job, case: str, trainers: Mapping[str, Trainer], num_rounds: int
) -> list[StepRow]:
    """Check agreement, then measure the trainers' steps and the bare products.

    The turns are interleaved on a CPU; a GPU, which could not hold all trainers, runs them in turn.
    """
    _say(f"{case}, {job.shape.name}, {job.dtype}: the eager loss ...")
    truth = TRUTHS[name](job), AGREEMENT[job.dtype]
    if job.device == "cuda":
        torch.cuda.empty_cache()  # for the trainers
    head = name != "reward-step"
    products = run_step_products if head else run_step_products_without_head
    everybody: dict[str, Trainer] = {PRODUCTS: products, **trainers}
    together = [[key] for key in everybody] if job.device == "cuda" else [list(everybody)]
    found: dict[str, Turns] = {}
    for keys in together:
        contestants = {key: (everybody[key], job) for key in keys}
        found |= measure_turns(contestants, dict.fromkeys(trainers, truth), num_rounds)
    bare = dict.fromkeys(trainers, found.pop(PRODUCTS))
    return rows_of(case, found, bare, PEER, head=head)


def compare_answers(jobs: Mapping[int, Job], case: str, num_rounds: int) -> list[StepRow]:
    """Measure our step by the number of answers to a prompt, relative to the fewest."""
    contestants: dict[str, tuple[Trainer, Job]] = {}
    truths: dict[str, tuple[float, float]] = {}
    for number, job in jobs.items():
        key = f"fastalign, {number} answers"
        _say(f"{case}, {number} answers, {job.shape.name}: the eager loss ...")
        truths[key] = eager_sft(job), AGREEMENT[job.dtype]
        contestants[key] = (fastalign_answers, job)
        contestants[f"{PRODUCTS} {key}"] = (run_step_products, job)
    found: dict[str, Turns] = {}
    one_by_one = [{key: one} for key, one in contestants.items()]
    cuda = any(job.device == "cuda" for job in jobs.values())
    for part in one_by_one if cuda else [contestants]:
        found |= measure_turns(part, truths, num_rounds)
    products = {key: found.pop(f"{PRODUCTS} {key}") for key in truths}
    return rows_of(case, found, products, next(iter(truths)), head=True)


def groups_of(
    name: str, case: str, shape: ModelShape, num_answers: int, arguments: argparse.Namespace
) -> list[Group]:
    """Return the rows of a case."""
    num_pairs = arguments.pairs or DEFAULT_PAIRS[arguments.device]
    if case == "chat":
        try:
            groups = read_groups(arguments.data, shape.vocab_size, num_pairs)
        except ValueError as error:
            raise SystemExit(str(error)) from error
    else:
        groups = make_groups(CASES[case], shape.vocab_size, num_pairs, num_answers)
    if name != "sft-step":
        return groups
    return [Group(group.prompt_ids, group.response_ids[:1]) for group in groups]


def compare_all_steps(arguments: argparse.Namespace) -> list[StepRow]:
    """Measure every dtype, model and case, and print the table."""
    name = arguments.name
    cases = arguments.case or [*DEFAULT_CASES, *(["chat"] if arguments.data else [])]
    if name == ANSWERS:
        cases = arguments.case or ["long-prompts"]
    elif "chat" not in cases:
        print("without chat: it takes a file of preference rows (--data)")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)  # this process computes the eager loss
    trainers = {} if name == ANSWERS else usable_trainers(name)
    trainers = wanted_trainers(trainers, arguments.peer)
    rows: list[StepRow] = []
    for model in arguments.model or DEFAULT_SHAPES[arguments.device]:
        for case in cases:
            rows += _compare_on(name, case, SHAPES[model], trainers, arguments)
    print_steps(rows)
    print_like_for_like(rows)
    print_notes(rows)
    return rows


def _compare_on(
    name: str,
    case: str,
    shape: ModelShape,
    trainers: Mapping[str, Trainer],
    arguments: argparse.Namespace,
) -> list[StepRow]:
    with tempfile.TemporaryDirectory() as path:
        numbers = NUM_ANSWERS if name == ANSWERS else (2,)
        jobs = {}
        for number in numbers:
            folder = Path(path) / str(number)
            folder.mkdir()
            groups = groups_of(name, case, shape, number, arguments)
            try:
                jobs[number] = make_job(name, shape, groups, folder, arguments, arguments.weights)
            except ValueError as error:
                raise SystemExit(str(error)) from error
        rows: list[StepRow] = []
        for dtype in arguments.dtype:
            in_dtype = {number: replace(job, dtype=dtype) for number, job in jobs.items()}
            if name == ANSWERS:
                rows += compare_answers(in_dtype, case, arguments.rounds)
            else:
                rows += compare_case(name, in_dtype[2], case, trainers, arguments.rounds)
        return rows


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
