"""Compare samplers: tokens per second, and the time to give an engine new weights."""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.rollout_cases import CASES, DEFAULT_CASES, write_policy
from benchmarks.rollout_rows import RolloutRow, Times, print_rollouts, rows_of
from benchmarks.rollout_samplers import OURS, Opener, RolloutJob, usable_samplers
from benchmarks.rollout_worker import SamplerFault, SamplerWorker

ROLLOUT = "rollout"


def measure_samplers(
    samplers: Mapping[str, Opener], job: RolloutJob, num_rounds: int
) -> dict[str, Times]:
    """Open all samplers, then interleave them: in each round a call and a sync of each.

    A sampler that does not open, fails, or does not sample from the policy is not timed, and its
    reason is kept. The program exits if one of ours samples from other weights.
    """
    found = {name: Times() for name in samplers}
    workers: dict[str, SamplerWorker] = {}

    def fails(name: str, fault: SamplerFault) -> None:
        if fault.is_wrong and name.startswith(OURS):
            raise SystemExit(f"{job.case.name}: {name}: {fault}")
        found[name].reason = str(fault)
        worker = workers.pop(name, None)
        if worker is not None:
            worker.stop()

    try:
        for name, opener in samplers.items():
            _say(f"{job.case.name}, {job.dtype}: {name} ...")
            try:
                workers[name] = SamplerWorker(opener, _with_scratch(job))
                found[name].num_bytes = workers[name].num_bytes
            except SamplerFault as fault:
                fails(name, fault)
        for number in range(num_rounds):
            _say(f"round {number + 1} of {num_rounds}")
            for pass_ in ("generate", "sync"):
                for name, worker in list(workers.items()):
                    if pass_ == "sync" and worker.num_bytes is None:
                        continue
                    try:
                        getattr(found[name], pass_).append(worker.turn(pass_))
                    except SamplerFault as fault:
                        fails(name, fault)
        for name, worker in list(workers.items()):
            try:
                found[name].peak_bytes = worker.turn("peak")
                worker.turn("check")  # the weights after the last sync
            except SamplerFault as fault:
                fails(name, fault)
    finally:
        for worker in workers.values():
            worker.stop()
    return found


def compare_rollouts(
    samplers: Mapping[str, Opener], job: RolloutJob, num_rounds: int
) -> dict[str, Times]:
    """Measure samplers interleaved on a CPU, and one after another on a GPU, which each fills."""
    if job.device == "cpu":
        return measure_samplers(samplers, job, num_rounds)
    found: dict[str, Times] = {}
    for name, opener in samplers.items():
        found |= measure_samplers({name: opener}, job, num_rounds)
    return found


def compare_all_rollouts(arguments: argparse.Namespace) -> list[RolloutRow]:
    """Measure every case and dtype, and print the table."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    samplers, missing = usable_samplers()
    rows: list[RolloutRow] = []
    for name in arguments.case or DEFAULT_CASES[arguments.device]:
        with tempfile.TemporaryDirectory() as path:
            folder = Path(path) / "policy"
            write_policy(CASES[name].shape, folder)
            for dtype in arguments.dtype:
                job = RolloutJob(
                    case=CASES[name],
                    folder=folder,
                    scratch=Path(path),
                    device=arguments.device,
                    dtype=dtype,
                    num_threads=torch.get_num_threads(),
                )
                found = compare_rollouts(samplers, job, arguments.rounds)
                found |= {name: Times(reason=reason) for name, reason in missing.items()}
                rows += rows_of(job, found)
    print_rollouts(rows)
    return rows


def _with_scratch(job: RolloutJob) -> RolloutJob:
    return replace(job, scratch=Path(tempfile.mkdtemp(dir=job.scratch)))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
