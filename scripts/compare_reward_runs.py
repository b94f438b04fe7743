"""Compares two reward models by the log-likelihood of the same held-out pairs, pair by pair.

Differences of pairs vary less than the pairs do, so their mean has a smaller standard error than
the two means that `fastalign report` shows.

    python scripts/compare_reward_runs.py runs/rao_kupper runs/bradley_terry
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastalign.evaluation import estimate


def read_pairs(folder: Path) -> list[dict[str, Any]]:
    """The rows of `eval/pairs.jsonl`.

    Raises:
        ValueError: there is none; the run has no held-out pairs, or is not finished.
    """
    path = folder / "eval" / "pairs.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder}: no eval/pairs.jsonl; expected a finished reward run")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> int:
    """Exit code 0: compared; 2: the caller's mistake, in one line."""
    parser = argparse.ArgumentParser(description="Log-likelihood of the same pairs, run by run.")
    parser.add_argument("first", type=Path, help="folder of a run (--run.dir)")
    parser.add_argument("second", type=Path, help="folder of another")
    options = parser.parse_args()
    try:
        first, second = read_pairs(options.first), read_pairs(options.second)
        if [row["source"] for row in first] != [row["source"] for row in second]:
            raise ValueError("expected two runs judged on the same rows of the same data.eval")
    except ValueError as error:
        print(f"compare_reward_runs: {error}", file=sys.stderr)
        return 2
    for name, kept in (("all pairs", (True, False)), ("ties", (True,)), ("the others", (False,))):
        values = [
            one["log_likelihood"] - other["log_likelihood"]
            for one, other in zip(first, second, strict=True)
            if one["tie"] in kept
        ]
        if values:
            found = estimate(values)
            print(f"{name}: {found.mean:+.4f} +- {found.standard_error:.4f} of {found.count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
