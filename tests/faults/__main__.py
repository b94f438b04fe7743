"""`python -m tests.faults`: does every fault to real runs and prints the table.

Exit code 0 only if every row survived. `--write FILE` puts the table between the marks in FILE.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.table import FOLDER, Row, as_markdown, declared, with_table

SURVIVED = "survived"


class Results:
    """What became of each row, from the tests that prove it."""

    def __init__(self) -> None:
        self.of_test: dict[str, Row] = {}
        self.found: dict[Row, str] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        self.of_test = {item.nodeid: item.function.row for item in items}

    def pytest_runtest_logreport(self, report: Any) -> None:
        row = self.of_test[report.nodeid]
        if report.failed:
            self.found[row] = "FAILED"
        elif report.skipped:
            self.found.setdefault(row, "skipped here")
        elif report.when == "call":
            self.found.setdefault(row, SURVIVED)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--write", type=Path, help="a document with the table's marks")
    parser.add_argument("-k", default="", help="only these tests, as pytest takes it")
    options = parser.parse_args(argv)
    results = Results()
    code = pytest.main([str(FOLDER), "-q", "-k", options.k], plugins=[results])
    rows = [row for row in declared() if row in results.of_test.values()]
    table = as_markdown(rows, results.found)
    print(f"\n{table}")
    survived = [row for row in rows if results.found.get(row) == SURVIVED]
    print(f"\n{len(survived)} of {len(rows)} rows survived")
    if options.write is not None:
        options.write.write_text(with_table(options.write.read_text(), table))
    return int(bool(code) or not rows or len(survived) < len(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
