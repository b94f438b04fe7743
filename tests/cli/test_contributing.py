"""The recipes of CONTRIBUTING.md are followed in a copy of the package: what they add is used."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_runs import fill, read_metrics

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# The file that the first line names, and the lines that go to its end.
ADDITIONS = re.findall(r"^```python\n# (\S+)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
RUN = "import sys; from fastalign.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package in which every recipe was followed, and small data."""
    folder = fill(tmp_path_factory.mktemp("changed"))
    shutil.copytree(
        ROOT / "fastalign", folder / "fastalign", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name, lines in ADDITIONS:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write("\n\n" + lines)
    return folder


def fastalign(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(folder),
            "XDG_CACHE_HOME": str(folder / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_recipe_has_at_most_ten_lines_of_code() -> None:
    assert len(ADDITIONS) >= 1
    assert [name for name, lines in ADDITIONS if lines.count("\n") > 10] == []


def test_a_loss_that_is_added_as_the_page_says_trains(changed: Path) -> None:
    flags = ["--model.path", "llama", "--data.train", "pairs.jsonl", "--run.dir", "run"]
    flags += ["--train.max-steps", "2", "--train.batch-size", "4", "--train.device", "cpu"]
    fastalign(changed, "dpo", *flags, "--loss", "exponential", "--loss.beta", "0.01")
    first, _ = read_metrics(changed / "run")
    # A mean of exponentials: within the bounds that the mean of their exponents gives by Jensen.
    assert first["loss"] >= math.exp(-0.01 * (first["logps/chosen"] - first["logps/rejected"]))
