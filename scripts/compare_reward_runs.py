"""Compare two reward models by the log-likelihood of the same held-out pairs, pair by pair.

Differences vary less than the pairs themselves, so their mean has a smaller standard error than
the two means in `fastalign report`.

    python scripts/compare_reward_runs.py runs/rao_kupper runs/bradley_terry
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastalign.evaluation.statistics import estimate


def read_pairs(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of `eval/pairs.jsonl`.

    Raises:
        ValueError: if there is none: the run has no held-out pairs, or is not finished.
    """
    path = folder / "eval" / "pairs.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder}: no eval/pairs.jsonl; expected a finished reward run")
    lines = path.read_text(encoding="utf-8").split("\n")  # U+2028 is text
    return [json.loads(line) for line in lines if line.strip()]


def main() -> int:
    """Print the comparison; return 0, or 2 after a caller's mistake."""
    parser = argparse.ArgumentParser(description="Compare two reward models on the same pairs.")
    parser.add_argument("first", type=Path, help="folder of a run (--run.dir)")
    parser.add_argument("second", type=Path, help="folder of another run")
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
