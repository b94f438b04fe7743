"""Two reward models on the same pairs: the mean of the differences and its standard error."""

import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make_run(folder: Path, likelihoods: list[float], source: str = "held_out.jsonl") -> Path:
    (folder / "eval").mkdir(parents=True)
    rows = [
        {"source": f"{source}:{n}", "tie": n > 2, "log_likelihood": value}
        for n, value in enumerate(likelihoods, start=1)
    ]
    (folder / "eval/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def compare(first: Path, second: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(ROOT / "scripts/compare_reward_runs.py"),
        str(first),
        str(second),
    ]
    return subprocess.run(
        command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )


def test_the_difference_is_pair_by_pair(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", [-1.0, -5.0, -2.0])
    two = make_run(tmp_path / "two", [-2.0, -8.0, -4.0])
    found = compare(one, two)
    assert found.returncode == 0, found.stderr
    # Differences 1, 3 and, of the tie, 2.
    lines = found.stdout.splitlines()
    assert lines[0] == f"all pairs: +2.0000 +- {1 / math.sqrt(3):.4f} of 3"
    assert lines[1] == "ties: +2.0000 +- nan of 1"
    assert lines[2] == "the others: +2.0000 +- 1.0000 of 2"


def test_other_pairs_or_none_are_refused_in_one_line(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", [-1.0, -5.0])
    other = make_run(tmp_path / "other", [-1.0, -5.0], source="other.jsonl")
    for second, expected in ((other, "judged on the same rows"), (tmp_path, "no eval/pairs.jsonl")):
        found = compare(one, second)
        assert found.returncode == 2
        assert expected in found.stderr
        assert found.stderr.count("\n") == 1
