"""`python -m benchmarks.gpu_check STAGE ... --out FOLDER`: run the stages on this machine's GPU.

Each stage takes nine minutes at most. FOLDER/STAGE/ holds NAME.json for every step, with its
status and the end of its output, NAME.rows.json with its figures, and NAME.txt with its output;
each is written as the step ends. A second run into the same folder takes the steps last that the
first did not finish. Exit code 1: a step is red, was stopped or was not reached.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu_check.carried import lines
from benchmarks.gpu_check.runner import LOST, ROOT, STAGE_SECONDS, Record, Stage, line_of
from benchmarks.gpu_check.stages import STEPS


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", nargs="*", type=int, help="1, 2 or 3; all by default")
    parser.add_argument("--out", type=Path, help="folder of the results, seen from the checkout")
    parser.add_argument(
        "--step", action="append", help="step to run, in place of all of a stage; may be repeated"
    )
    parser.add_argument("--minutes", type=float, default=STAGE_SECONDS / 60, help="time of a stage")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="without a GPU: compiled kernels' resources, the steps, the tests' collection, and "
        "what a machine without a network needs",
    )
    return parser


def dry_run() -> None:
    """Check what can be checked without a GPU, and print what would run and what it would need."""
    for number, steps in STEPS.items():
        print(f"stage {number}: {sum(step.seconds for step in steps):.0f} s")
        for step in steps:
            reason = step.missing()
            note = f"; skipped here: {reason}" if reason else ""
            print(f"  {step.name:20}{step.seconds:5.0f} to {step.most:.0f} s{note}")
    print("\n".join(lines()), flush=True)
    python = [sys.executable, "-m"]
    subprocess.run([*python, "tests.ops.kernel_resources"], cwd=ROOT, check=True)
    environment = os.environ | {"FASTALIGN_TEST_GPU": "1"}
    collect = [*python, "pytest", "tests/gpu", "-q", "--collect-only", "-p", "no:cacheprovider"]
    collected = subprocess.run(
        collect, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    print("\n".join(collected.stdout.splitlines()[-2:]))
    if collected.returncode != 0:
        raise SystemExit(collected.returncode)


def run(arguments: argparse.Namespace) -> list[Record]:
    """Run the stages; return the records of all steps."""
    records: list[Record] = []
    for number in arguments.stage or STEPS:
        folder = arguments.out / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        steps = [step for step in STEPS[number] if step.name in (arguments.step or [step.name])]
        print(f"stage {number}, results in {folder}", flush=True)
        for record in Stage(folder.resolve(), 60 * arguments.minutes).run(steps):
            print(line_of(record), flush=True)
            records.append(record)
    return records


def main() -> None:
    """Run the stages, or the checks that need no GPU."""
    parser = make_parser()
    arguments = parser.parse_args()
    if arguments.dry_run:
        dry_run()
        return
    if arguments.out is None:
        parser.error("--out: expected a folder for the results, got none")
    for number in arguments.stage:
        if number not in STEPS:
            parser.error(f"stage: expected one of {', '.join(map(str, STEPS))}, got {number}")
    known = {step.name for number in arguments.stage or STEPS for step in STEPS[number]}
    for name in arguments.step or []:
        if name not in known:
            parser.error(f"--step: expected one of {', '.join(sorted(known))}, got {name!r}")
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --dry-run makes the checks that need none")
    raise SystemExit(any(record.status in LOST for record in run(arguments)))


if __name__ == "__main__":
    main()
