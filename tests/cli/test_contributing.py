"""The recipes of CONTRIBUTING.md are followed in a copy of the package: what they add is used."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_runs import fill, prompts_file, read_metrics, words_reward

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# The file that the first line names, and the lines that go to its end.
ADDITIONS = re.findall(r"^```python\n# (\S+)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
RUN = """
import json, sys
from fastalign.cli.main import main
sys.exit(max(main(arguments) for arguments in json.loads(sys.argv[1])))
"""
SHORT = ["--train.max-steps", "2", "--train.batch-size", "4", "--train.device", "cpu"]
DPO = ["dpo", "--data.train", "pairs.jsonl", "--loss", "exponential", "--loss.beta", "0.01"]
PPO = ["ppo", "--data.train", "prompts.jsonl", "--ppo.advantage", "median", "--reward.sources"]
PPO += ["words.json", "--sampling.max-new-tokens", "3", "--sampling.num-samples", "2"]


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package in which every recipe was followed, and its runs."""
    folder = fill(tmp_path_factory.mktemp("changed"))
    prompts_file(folder)
    words_reward(folder)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fastalign", folder / "fastalign", ignore=ignored)
    for name, lines in ADDITIONS:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write("\n\n" + lines)
    commands = [
        [*command, "--model.path", "llama", "--run.dir", command[0], *SHORT]
        for command in (DPO, PPO)
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_each_recipe_has_at_most_ten_lines_of_code() -> None:
    assert len(ADDITIONS) >= 2
    lengths = {name: len([x for x in lines.splitlines() if x]) for name, lines in ADDITIONS}
    assert {name: n for name, n in lengths.items() if n > 10} == {}


def test_a_loss_trains(changed: Path) -> None:
    first, _ = read_metrics(changed / "dpo")
    # A mean of exponentials is at least the exponential of the mean.
    assert first["loss"] >= math.exp(-0.01 * (first["logps/chosen"] - first["logps/rejected"]))
    assert "exponential" in (changed / "dpo/config.yaml").read_text()


def test_an_advantage_trains(changed: Path) -> None:
    assert len(read_metrics(changed / "ppo")) == 2
    assert "median" in (changed / "ppo/config.yaml").read_text()
