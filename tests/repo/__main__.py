"""`python -m tests.repo [CHECKOUT]`: print measures of a checkout's structure.

`--static` leaves out the two tiny runs whose files are counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.repo import structure
from tests.repo.structure import ROOT, Checkout

PARTS = ("fastalign/trainers", "fastalign/runs")


def files_that_run(checkout: Path) -> dict[str, Any]:
    """Return what `tests/repo/entered.py` finds, in a process that imports that checkout."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).parent / "entered.py"), str(checkout), folder]
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def listed(title: str, measure: Callable[[Checkout], dict[str, int]], checkout: Checkout) -> str:
    """Return a line with the number of a measure's finds, and the finds."""
    found = measure(checkout)
    items = ", ".join(f"{name} {n}" for name, n in sorted(found.items()))
    return f"{title}: {len(found)}" + (f" ({items})" if found else "")


def static_lines(checkout: Checkout) -> Iterator[str]:
    """Yield the lines of all that is read from the sources."""
    tests = checkout.read("tests")
    package = list(checkout.modules.values())
    for name, modules in (("fastalign", package), ("tests", tests)):
        lines = sum(module.num_lines for module in modules)
        yield f"{name}/: {lines} lines in {len(modules)} files"
    longest = max(package, key=lambda module: module.num_lines)
    yield f"longest module: {longest.num_lines} lines ({longest.path})"
    yield listed("folders of more than 15 modules", structure.large_folders, checkout)
    yield listed("functions of more than 8 parameters", structure.many_parameters, checkout)
    yield listed("functions of more than 50 code lines", structure.long_functions, checkout)
    yield listed("modules of more than 600 lines", structure.long_modules, checkout)
    yield listed("modules under 60 lines for one neighbour", structure.small_modules, checkout)
    yield listed("tables of algorithms beside the one", structure.algorithm_tables, checkout)
    yield f"D401 violations: {sum(structure.not_imperative(checkout).values())}"
    opened = sum(structure.poor_openings(checkout).values())
    yield f"docstrings that begin with What, Of, Whether, How, Nothing, By or That: {opened}"
    hidden = structure.naming(checkout, "hidden")
    yield f"files with a variable `hidden`: {len(hidden)}"
    for function in ("train_dpo", "train_ppo"):
        reached = len(checkout.closure(function))
        yield f"modules that the imports of {function}'s module reach: {reached}"


def dynamic_lines(checkout: Path) -> Iterator[str]:
    """Yield the lines about the files that two tiny runs enter."""
    for algorithm, found in files_that_run(checkout).items():
        lines = found["lines"]
        own = [n for path, n in lines.items() if path.startswith(PARTS)]
        yield (
            f"a {algorithm} run enters {found['functions']} functions in {len(lines)} files of "
            f"{sum(lines.values())} lines; {len(own)} of them, of {sum(own)} lines, in trainers/ "
            "and runs/"
        )


def main(argv: list[str]) -> int:
    """Print the measures of a checkout; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.repo", description=__doc__)
    parser.add_argument("checkout", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--static", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    root = options.checkout.resolve()
    for line in static_lines(Checkout(root)):
        print(line)
    for line in () if options.static else dynamic_lines(root):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
