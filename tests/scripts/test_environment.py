"""The environment of the scripts: what is installed once, and what another extra adds."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a folder with the scripts, and an interpreter that writes down what pip installs."""
    for name in ("pyproject.toml", "setup.py", "constraints.txt", "csrc/a.h", "csrc/cpu/a.cpp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "scripts").mkdir()
    text = (ROOT / "scripts" / "environment.sh").read_text()
    (tmp_path / "scripts" / "environment.sh").write_text(text)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor last; do :; done\necho "$last" >> installed.txt\n')
    python.chmod(0o755)
    return tmp_path


def installed(clone: Path, extras: str = "") -> list[str]:
    """Return what a call with these extras installs."""
    (clone / "installed.txt").write_text("")
    call = f'set -euo pipefail; export FASTALIGN_EXTRAS="{extras}"; . scripts/environment.sh'
    subprocess.run(["bash", "-c", call], cwd=clone, check=True, stdout=subprocess.DEVNULL)
    return (clone / "installed.txt").read_text().split()


def test_a_second_call_installs_nothing(clone: Path) -> None:
    assert installed(clone) == ["torch", "."]
    assert installed(clone) == []


def test_another_extra_is_added_and_none_is_forgotten(clone: Path) -> None:
    assert installed(clone, "lora") == ["torch", ".[lora]"]
    assert installed(clone, "report") == ["torch", ".[lora,report]"]
    for extras in ("", "lora", "report", "report,lora"):
        assert installed(clone, extras) == []
    (clone / "constraints.txt").write_text("another pin")
    assert installed(clone) == ["torch", ".[lora,report]"]


def test_an_extra_is_no_part_of_another(clone: Path) -> None:
    assert installed(clone, "trl-old") == ["torch", ".[trl-old]"]
    assert installed(clone, "trl") == ["torch", ".[trl-old,trl]"]
