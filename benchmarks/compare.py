"""`python -m benchmarks.compare NAME`: compare implementations in a table and JSON.

NAME is a head's loss and gradient (`head`, `dpo-loss`, `orpo`, `linear-logprob`), every operation's
backends (`operations`), optimiser steps beside TRL's trainers (`dpo-step`, `sft-step`,
`reward-step`) or by the number of answers to a prompt (`answers-step`), or samplers (`rollout`).
An implementation whose result differs from the eager one's is not timed.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import heads, rollout_cases, step_cases
from benchmarks.compare_rollouts import ROLLOUT, compare_all_rollouts
from benchmarks.compare_steps import NAMES, compare_all_steps
from benchmarks.head_rows import DTYPES, compare_heads
from benchmarks.operations import compare_operations, print_operations
from benchmarks.peers import PEERS
from fastalign.written_files import check_file, write_file

OPERATIONS = "operations"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name", choices=[*sorted(heads.IMPLEMENTATIONS), OPERATIONS, *NAMES, ROLLOUT]
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        action="append",
        help="may be repeated; by default both on a CPU (float32 for steps), bfloat16 on a GPU",
    )
    parser.add_argument(
        "--case",
        choices=[*heads.CASES, *step_cases.CASES, *rollout_cases.CASES],
        action="append",
        help="may be repeated",
    )
    known = sorted({peer for peers in PEERS.values() for peer in peers})
    parser.add_argument(
        "--peer",
        choices=known,
        action="append",
        help="peer of a head; may be repeated; by default all",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="number of timed calls of each implementation"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument(
        "--tested", action="store_true", help="`head`: do not run the head's tests first"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace that file if it exists")
    steps = parser.add_argument_group("whole steps")
    steps.add_argument(
        "--model", choices=list(step_cases.SHAPES), action="append", help="may be repeated"
    )
    steps.add_argument("--pairs", type=int, help="rows of a step; by default 8, on a GPU 16")
    steps.add_argument(
        "--threads", type=int, help="CPU threads of steps and samplers; by default torch's"
    )
    steps.add_argument("--data", type=Path, help="preference rows of the case `chat`")
    return parser


def cases_of(name: str) -> set[str]:
    """Return the cases of a comparison."""
    if name == OPERATIONS:
        return set()
    if name == ROLLOUT:
        return set(rollout_cases.CASES)
    return set(step_cases.CASES if name in NAMES else heads.CASES)


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
        if peer not in PEERS.get(name, {}):
            parser.error(f"--peer: {name} has no {peer!r}")
    for flag in ("model", "pairs", "threads", "data"):
        allowed = name in NAMES or (name == ROLLOUT and flag == "threads")
        if getattr(arguments, flag) is not None and not allowed:
            parser.error(f"--{flag}: {name} is no step")
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
        on_cpu = ["float32"] if name in (*NAMES, ROLLOUT) else list(DTYPES)
        arguments.dtype = on_cpu if arguments.device == "cpu" else ["bfloat16"]
    return arguments


def compare(arguments: argparse.Namespace) -> list[Any]:
    """Run every case and print the table."""
    name, device, rounds = arguments.name, arguments.device, arguments.rounds
    if name == ROLLOUT:
        return list(compare_all_rollouts(arguments))
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
    tested = arguments.tested
    return list(compare_heads(name, cases, device, arguments.dtype, rounds, peers, tested=tested))


def main() -> None:
    """Run every case, print the table, write the JSON."""
    arguments = parse_arguments()
    rows = compare(arguments)
    if arguments.json:
        records = [{k.rstrip("_"): v for k, v in asdict(row).items()} for row in rows]
        text = json.dumps(records, indent=1) + "\n"
        write_file(arguments.json, text, overwrite=arguments.overwrite)


if __name__ == "__main__":
    main()
