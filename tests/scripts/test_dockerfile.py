"""The Dockerfile: its lint, and that what it copies, names and builds is there."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
STEPS = re.sub(r"\\\n", " ", TEXT).splitlines()
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
    "hadolint"
)


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint (the extra dev)")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [str(HADOLINT), "--no-color", "Dockerfile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def copied() -> set[str]:
    """What stages copy from the checkout, and not from each other."""
    lines = [line.split()[1:-1] for line in STEPS if re.match(r"COPY (?!--from)", line)]
    return {name for names in lines for name in names}


def test_what_is_copied_exists_and_is_sent() -> None:
    sent = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert copied() == sent
    assert [name for name in copied() if not (ROOT / name).exists()] == []


def test_the_package_builds_from_what_is_copied() -> None:
    """setup.py and pyproject.toml read nothing else."""
    sources = (ROOT / "setup.py").read_text()
    assert {path.split("/")[0] for path in re.findall(r'Path\("([\w/]+)"\)', sources)} <= copied()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= copied()


def test_extras_and_stages_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        name for found in re.findall(r"whl\)\[([\w,-]+)\]", TEXT) for name in found.split(",")
    }
    assert extras
    assert extras <= set(project["optional-dependencies"])
    stages = re.findall(r"^FROM \S+ AS (\S+)$", TEXT, flags=re.MULTILINE)
    assert set(re.findall(r"^# +docker build --target (\w+)", TEXT, flags=re.MULTILINE)) == {
        "cpu",
        "gpu",
    }
    assert {"cpu", "gpu", *re.findall(r"--from=(\S+)", TEXT)} <= set(stages)
