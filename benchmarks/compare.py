"""`python -m benchmarks.compare NAME`: compare implementations in a table and JSON.

NAME is a head's loss and gradient (`head`, `dpo-loss`, `orpo`, `linear-logprob`), every operation's
backends (`operations`), optimiser steps beside TRL's trainers and a careful eager loop (`dpo-step`,
`sft-step`, `reward-step`) or by the number of answers to a prompt (`answers-step`), iterations of
PPO (`ppo-step`), samplers (`rollout`), or the growth of a DPO step with each of its sizes
(`growth`). An implementation whose result differs from the eager one's is not timed.

On a CPU each table is made twice: with glibc's allocator as it is, and with one that keeps freed
memory, since that alone changes how implementations compare.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import heads, rollout_cases, step_cases
from benchmarks.compare_ppo import PPO, compare_all_ppo
from benchmarks.compare_rollouts import ROLLOUT, compare_all_rollouts
from benchmarks.compare_steps import NAMES, OURS, compare_all_steps
from benchmarks.growth import BASE, GROWTH, compare_growth
from benchmarks.head_rows import DTYPES, PASSES, compare_heads, refuse_on_a_red_test
from benchmarks.measure import ALLOCATORS, allocator_name
from benchmarks.operations import compare_operations, print_operations
from benchmarks.peers import PEERS
from benchmarks.ppo_trainers import trainers_of
from benchmarks.step_trainers import TRAINERS
from fastalign.written_files import check_file, write_file

OPERATIONS = "operations"
STEPS = (*NAMES, PPO, GROWTH)
BOTH = "both"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name", choices=[*sorted(heads.IMPLEMENTATIONS), OPERATIONS, *STEPS, ROLLOUT]
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        action="append",
        help="may be repeated; by default both on a CPU (float32 for steps), bfloat16 on a GPU",
    )
    cases = dict.fromkeys(c for n in (OPERATIONS, "head", *STEPS, ROLLOUT) for c in cases_of(n))
    parser.add_argument("--case", choices=list(cases), action="append", help="may be repeated")
    parser.add_argument(
        "--allocator",
        choices=[*ALLOCATORS, BOTH],
        help="glibc's as it is (default), or one that keeps freed memory; on a CPU both",
    )
    known = sorted({peer for name in (*PEERS, *STEPS) for peer in peers_of(name)})
    parser.add_argument(
        "--peer",
        choices=known,
        action="append",
        help="peer of a head or a step; may be repeated; by default all",
    )
    parser.add_argument(
        "--pass",
        dest="passes",
        choices=list(PASSES),
        action="append",
        help="pass of a head; may be repeated",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="number of timed calls of each implementation"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument(
        "--tested", action="store_true", help="`head`: do not run the head's tests first"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace that file if it exists")
    add_step_options(parser)
    return parser


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of whole steps."""
    steps = parser.add_argument_group("whole steps")
    steps.add_argument(
        "--model", choices=list(step_cases.SHAPES), action="append", help="may be repeated"
    )
    steps.add_argument(
        "--weights",
        type=Path,
        help="folder of a pretrained model of --model's shape, which the policy begins as "
        "(python scripts/fetch_sample_model.py: smollm2-135m); by default it is random",
    )
    steps.add_argument("--pairs", type=int, help="rows of a step; by default 8, on a GPU 16")
    steps.add_argument(
        "--threads", type=int, help="CPU threads of steps and samplers; by default torch's"
    )
    steps.add_argument("--data", type=Path, help="preference rows of the case `chat`")
    steps.add_argument(
        "--trl-ppo", type=Path, help="folder that ./scripts/trl_ppo_environment.sh made"
    )


def cases_of(name: str) -> list[str]:
    """Return the cases of a comparison."""
    tables: dict[str, Mapping[str, object]] = {
        OPERATIONS: {},
        ROLLOUT: rollout_cases.CASES,
        PPO: step_cases.PPO_CASES,
        GROWTH: asdict(BASE),
    }
    return list(tables.get(name, step_cases.CASES if name in NAMES else heads.CASES))


def peers_of(name: str) -> list[str]:
    """Return the peers that a comparison has."""
    trainers = {PPO: trainers_of("gae")} | TRAINERS
    return [peer for peer in trainers.get(name, PEERS.get(name, {})) if not peer.startswith(OURS)]


def parse_arguments() -> argparse.Namespace:
    """Return the checked arguments of the command line."""
    parser = make_parser()
    arguments = parser.parse_args()
    name = arguments.name
    for flag in ("rounds", "pairs", "threads"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            parser.error(f"--{flag}: expected at least 1, got {value}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    for case in arguments.case or []:
        if case not in cases_of(name):
            parser.error(f"--case: {name} has no {case!r}")
    for peer in arguments.peer or []:
        if peer not in peers_of(name):
            parser.error(f"--peer: {name} has no {peer!r}")
    taken = dict.fromkeys(("pairs", "weights", "data"), NAMES)
    taken |= {"model": STEPS, "threads": (*STEPS, ROLLOUT), "trl_ppo": (PPO,)}
    for flag, names in taken.items():
        if getattr(arguments, flag) is not None and name not in names:
            parser.error(f"--{flag.replace('_', '-')}: {name} does not take it")
    if name in (PPO, GROWTH) and arguments.device != "cpu":
        parser.error(f"--device: {name} runs on a CPU only, got {arguments.device}")
    if arguments.trl_ppo is not None and not (arguments.trl_ppo / "trl").is_dir():
        parser.error(f"--trl-ppo: expected a folder with TRL in it, got {arguments.trl_ppo}")
    if arguments.weights is not None and not (arguments.weights / "config.json").is_file():
        parser.error(f"--weights: expected a folder of a model, got {arguments.weights}")
    if arguments.passes and name not in heads.IMPLEMENTATIONS:
        parser.error(f"--pass: {name} is no head")
    if arguments.tested and name != "head":
        parser.error(f"--tested: {name} runs no tests")
    if name == "answers-step" and "chat" in (arguments.case or []):
        parser.error("--case: its rows have two answers each, and answers-step takes up to 8")
    if arguments.case and "chat" in arguments.case and arguments.data is None:
        parser.error("--case chat: expected a file of preference rows in --data, got none")
    if arguments.data is not None and not arguments.data.exists():
        parser.error(f"--data: {arguments.data} is not there")
    if arguments.json:  # fail before the work, not after it
        try:
            check_file("--json", arguments.json, overwrite=arguments.overwrite)
        except (ValueError, OSError) as error:
            parser.error(str(error))
    if arguments.dtype is None:
        on_cpu = ["float32"] if name in (*STEPS, ROLLOUT) else list(DTYPES)
        arguments.dtype = on_cpu if arguments.device == "cpu" else ["bfloat16"]
    if arguments.allocator is None:
        arguments.allocator = BOTH if arguments.device == "cpu" else allocator_name()
    return arguments


def compare(arguments: argparse.Namespace) -> list[Any]:
    """Run every case and print the table."""
    name, device, rounds = arguments.name, arguments.device, arguments.rounds
    if name == ROLLOUT:
        return list(compare_all_rollouts(arguments))
    if name == PPO:
        return list(compare_all_ppo(arguments))
    if name == GROWTH:
        return list(compare_growth(arguments))
    if name in NAMES:
        return list(compare_all_steps(arguments))
    if name == OPERATIONS:
        rows = [
            row
            for dtype_name in arguments.dtype
            for row in compare_operations(device, dtype_name, rounds)
        ]
        print_operations(rows)
        return list(rows)
    cases, peers = arguments.case or [], arguments.peer or []
    options = {"tested": arguments.tested, "passes": arguments.passes or ()}
    return list(compare_heads(name, cases, device, arguments.dtype, rounds, peers, **options))


def records_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every case in this process; return the rows, each with the allocator's name."""
    rows = compare(arguments)
    return [
        {k.rstrip("_"): v for k, v in asdict(row).items()} | {"allocator": allocator_name()}
        for row in rows
    ]


def records_under(name: str, *flags: str) -> list[dict[str, Any]]:
    """Run every case in a process that starts with these settings of the allocator."""
    print(f"allocator: {name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        own = ["--allocator", name, "--json", str(file), *flags]
        command = [sys.executable, "-m", "benchmarks.compare", *sys.argv[1:], *own]
        known = {variable for settings in ALLOCATORS.values() for variable in settings}
        environment = {k: v for k, v in os.environ.items() if k not in known}
        done = subprocess.run(command, check=False, env=environment | ALLOCATORS[name])
        if done.returncode != 0:
            raise SystemExit(done.returncode)
        found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        return found


def main() -> None:
    """Run every case, print the table, write the JSON."""
    arguments = parse_arguments()
    if arguments.allocator == allocator_name():
        records = records_of(arguments)
    else:
        flags = []
        if arguments.name == "head" and not arguments.tested:
            refuse_on_a_red_test(arguments.device)
            flags = ["--tested"]
        names = list(ALLOCATORS) if arguments.allocator == BOTH else [arguments.allocator]
        records = [record for name in names for record in records_under(name, *flags)]
    if arguments.json:
        text = json.dumps(records, indent=1) + "\n"
        write_file(arguments.json, text, overwrite=arguments.overwrite)


if __name__ == "__main__":
    main()
