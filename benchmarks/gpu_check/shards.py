"""Run GPU tests in several processes, and write what became of each test as it ends.

pytest-xdist shares the tests if it is installed; otherwise each process collects all and runs every
n-th. A test that was begun and did not end is in the figures, too: there a process hung or died.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check.rows import Rows, make_parser
from benchmarks.gpu_check.runner import ROOT

PROCESSES = 8
PLUGIN = "benchmarks.gpu_check.shards"
# Environment of each process: its share of the tests ("3/8"), and the folder for their results.
SHARD, RESULTS = "FASTALIGN_TEST_SHARD", "FASTALIGN_TEST_RESULTS"
WORKER = "PYTEST_XDIST_WORKER"  # set by xdist in its workers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep this process's share: the tests of a file take about as long as their neighbours."""
    if SHARD in os.environ:
        number, count = map(int, os.environ[SHARD].split("/"))
        items[:] = items[number::count]


def pytest_runtest_logstart(nodeid: str) -> None:
    """Write that a test begins."""
    _append({"test": nodeid, "outcome": "begun"})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write how a test ended: by its call, or by a set-up or tear-down that was not good."""
    if report.when == "call" or report.outcome != "passed":
        reason = "" if report.outcome == "passed" else str(report.longrepr)[-1000:]
        _append(
            {
                "test": report.nodeid,
                "outcome": report.outcome,
                "seconds": report.duration,
                "reason": reason,
            }
        )


def _append(result: dict[str, Any]) -> None:
    # a controller of xdist repeats what its workers report
    if RESULTS in os.environ and _reports():
        with (Path(os.environ[RESULTS]) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")


def _reports() -> bool:
    return SHARD in os.environ or WORKER in os.environ


def commands(arguments: Sequence[str], processes: int, *, xdist: bool) -> Iterator[list[str]]:
    """Yield the commands of the processes, without their environment."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", PLUGIN, "-p", "no:cacheprovider"]
    if xdist:
        yield [*command, "-n", str(processes), *arguments]
        return
    for _ in range(processes):
        yield [*command, *arguments]


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the last word on each test; a failure of any phase is the last."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            if found.get(result["test"], {}).get("outcome") != "failed":
                found[result["test"]] = result
    return found


def run(arguments: Sequence[str], processes: int, folder: Path, *, xdist: bool) -> list[int]:
    """Run the processes; return their exit codes, without those of empty shares."""
    environment = os.environ | {"FASTALIGN_TEST_GPU": "1", RESULTS: str(folder)}
    environment.pop(WORKER, None)  # of a pytest that this process may be in
    started = []
    for number, command in enumerate(commands(arguments, processes, xdist=xdist)):
        shard = {} if xdist else {SHARD: f"{number}/{processes}"}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment | shard))
    codes = [process.wait() for process in started]
    return [code for code in codes if code != pytest.ExitCode.NO_TESTS_COLLECTED]


def main() -> None:
    """Run the tests, write the counts and every test that did not pass."""
    parser = make_parser("shards", __doc__)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("tests", nargs=argparse.REMAINDER, help="files, and pytest's options")
    arguments = parser.parse_args()
    folder = arguments.json.with_suffix(".tests")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.jsonl"):
        stale.unlink()
    xdist = importlib.util.find_spec("xdist") is not None
    codes = run(arguments.tests, arguments.processes, folder, xdist=xdist)
    found, rows = results(folder), Rows(arguments.json)
    rows.add(Counter(str(result["outcome"]) for result in found.values()))
    for result in found.values():
        if result["outcome"] not in ("passed", "skipped"):
            rows.add(result)
    if any(codes) or not found:
        raise SystemExit(f"exit codes {codes}, {len(found)} tests")


if __name__ == "__main__":
    main()
