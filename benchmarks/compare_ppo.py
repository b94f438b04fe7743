"""Compare PPO iterations: sampling, scores, log-probs and all updates, by GAE, RLOO and GRPO.

TRL's last PPOTrainer is that of 1.12.0, which `scripts/trl_ppo_environment.sh FOLDER` installs.
"""

import argparse
import importlib.metadata
import importlib.util
import random
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.compare_steps import PEER, PRODUCTS, job_in, measure_turns, wanted_trainers
from benchmarks.ppo_trainers import trainers_of, write_reward_adapter
from benchmarks.step_cases import (
    DEFAULT_PPO_CASES,
    DEFAULT_SHAPES,
    EOS,
    FIRST_WORD,
    PPO_CASES,
    SHAPES,
    ModelShape,
    PPOCase,
    write_model,
    write_rows,
)
from benchmarks.step_rows import StepRow, print_like_for_like, print_steps, rows_of
from benchmarks.step_work import eager_nats, run_iteration_products
from benchmarks.step_worker import Job, Trainer
from fastalign.batch.packed import Group

PPO = "ppo-step"
NOTES = """\
A turn is one iteration: sampling, scores, log-probs (values) before the updates, all updates, and
logging. loss: nats of a sampled response, compared with those of transformers' own samples. of
products: time of the bare matrix products that an iteration needs if a prompt is computed once for
its samples. careful eager: a loop of our own in plain PyTorch: padded rows, the head on response
tokens alone. share-policy: values from the policy's own layers, so that an update has one forward
and backward; one-base: LoRA of rank 16 for policy, values and rewards, on one frozen base; both are
compared with the products of four separate models. ratio: time of TRL's iteration over this
one's."""


def make_prompts(case: PPOCase, vocab_size: int) -> list[Group]:
    """Return fixed prompts of random ids, each with as many answers as will be sampled."""
    groups = []
    for number in range(case.num_prompts):
        draw = random.Random(number)
        length = draw.randint(*case.prompt_lengths)
        prompt = [draw.randrange(FIRST_WORD, vocab_size) for _ in range(length)]
        answer = [FIRST_WORD] * (case.new_tokens - 1) + [EOS]
        groups.append(Group(prompt, [answer] * case.num_samples))
    return groups


def make_job(case: PPOCase, shape: ModelShape, folder: Path, arguments: argparse.Namespace) -> Job:
    """Write the models and prompts of a case and return its job."""
    write_model(shape, folder / "policy", 0)
    write_model(shape, folder / "reward", 1, reward=True)
    groups = make_prompts(case, shape.vocab_size)
    write_rows(groups, folder / "rows.jsonl", "prompts")
    job = replace(job_in(folder, shape, groups, arguments), reference=folder / "reward", ppo=case)
    if case.has_value:
        write_reward_adapter(job)
    return job


def usable_trainers(case: PPOCase, packages: Path | None) -> tuple[dict[str, Trainer], str | None]:
    """Return the trainers that can run here, and TRL's version if it is one of them."""
    found = trainers_of(case.advantage)
    if case.has_value:
        reason = "--trl-ppo names no folder (./scripts/trl_ppo_environment.sh FOLDER makes one)"
        versions = importlib.metadata.distributions(name="trl", path=[str(packages)])
        version = next((each.version for each in versions), None) if packages else None
    else:
        installed = importlib.util.find_spec("trl") is not None
        reason = "it is not installed"
        version = importlib.metadata.version("trl") if installed else None
    if version is None:
        print(f"{case.name}, without trl: {reason}")
        del found[PEER]
    return found, version


def compare_case(
    job: Job, trainers: Mapping[str, Trainer], packages: Path | None, num_rounds: int
) -> list[StepRow]:
    """Check the samples, then measure the trainers' iterations and the bare products."""
    assert job.ppo is not None
    print(f"{job.ppo.name}, {job.shape.name}: eager samples ...", file=sys.stderr, flush=True)
    truth = eager_nats(job)
    contestants: dict[str, tuple[Trainer, Job]] = {PRODUCTS: (run_iteration_products, job)}
    for name, trainer in trainers.items():
        own = packages if name == PEER and job.ppo.has_value else None
        contestants[name] = (trainer, replace(job, packages=own))
    found = measure_turns(contestants, dict.fromkeys(trainers, truth), num_rounds)
    bare = dict.fromkeys(trainers, found.pop(PRODUCTS))
    return rows_of(job.ppo.name, found, bare, PEER, head=True)


def compare_all_ppo(arguments: argparse.Namespace) -> list[StepRow]:
    """Measure every case and print the table."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    rows: list[StepRow] = []
    for model in arguments.model or DEFAULT_SHAPES["cpu"]:
        for name in arguments.case or DEFAULT_PPO_CASES:
            case = PPO_CASES[name]
            trainers, version = usable_trainers(case, arguments.trl_ppo)
            trainers = wanted_trainers(trainers, arguments.peer)
            with tempfile.TemporaryDirectory() as path:
                job = make_job(case, SHAPES[model], Path(path), arguments)
                of_case = compare_case(job, trainers, arguments.trl_ppo, arguments.rounds)
            rows += [replace(row, pass_="PPO iteration", trl=version) for row in of_case]
    print_steps(rows)
    print_like_for_like(rows)
    print(NOTES)
    return rows
