"""The comparison of two commits' results: what is compared, and what is named when it differs."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

SCRIPTS = Path(__file__).parents[2] / "scripts"
Compare = Callable[[Path, Path], tuple[int, str]]


def write_results(
    folder: Path, *, loss: float = 1.0, seconds: float = 1.0, cell: str = "4"
) -> Path:
    run = folder / "quickstart" / "sft"
    for name in ("model", "eval", "checkpoints"):
        (run / name).mkdir(parents=True)
    rows = [
        {"step": 1, "loss": 2.0, "time/gradient_seconds": seconds},
        {"step": 2, "loss": loss, "eps": seconds, "tokens_per_second": seconds},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = {"kl": [1.0, {"se": None}], "model": str(run / "model")}
    (run / "eval" / "eval.json").write_text(json.dumps(evaluation))
    (run / "checkpoints" / "state.json").write_text(json.dumps(seconds))
    save_file({"w": torch.full((3,), loss, dtype=torch.bfloat16)}, run / "model/model.safetensors")
    head = "<tr><th>run</th><th>reward</th><th>seconds</th></tr>"
    row = f"<tr><td>sft</td><td>{cell}</td><td>{seconds}</td></tr>"
    (folder / "quickstart/report.html").write_text(f"<table>{head}{row}</table>")
    return folder


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Compare:
    monkeypatch.syspath_prepend(SCRIPTS)
    script: Any = importlib.import_module("compare_runs")

    def compare_folders(old: Path, new: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(old), str(new)])
        return script.main(), capsys.readouterr().out

    return compare_folders


def test_folders_and_wall_times_may_differ(compare: Compare, tmp_path: Path) -> None:
    old = write_results(tmp_path / "old")
    code, out = compare(old, write_results(tmp_path / "new", seconds=2.0))
    assert code == 0
    assert out.splitlines() == [
        "quickstart: identical (2 values in 1 files)",
        "quickstart/sft: identical (8 values in 3 files)",
    ]


def test_a_last_bit_of_one_value_is_named(compare: Compare, tmp_path: Path) -> None:
    old = write_results(tmp_path / "old")
    code, out = compare(old, write_results(tmp_path / "new", loss=1.0 + 2**-52))
    assert code == 1
    assert out.splitlines()[1] == (
        "quickstart/sft: 1 of 8 values differ, largest relative difference 2.2e-16; first: "
        "quickstart/sft/metrics.jsonl, line 2, step 2: loss 1.0, now 1.0000000000000002"
    )


def test_weights_tables_and_missing_files_are_named(compare: Compare, tmp_path: Path) -> None:
    old = write_results(tmp_path / "old")
    new = write_results(tmp_path / "new", loss=2.0, cell="5")
    code, out = compare(old, new)
    assert code == 1
    assert "table 1, row 1, reward '4', now '5'" in out
    (new / "quickstart/sft/metrics.jsonl").write_bytes(
        (old / "quickstart/sft/metrics.jsonl").read_bytes()
    )
    assert "model.safetensors, w 'torch.bfloat16 [3] " in compare(old, new)[1]
    (new / "quickstart/sft/eval/eval.json").unlink()
    assert "eval/eval.json: not in the second folder" in compare(old, new)[1]


def test_mistakes_are_lines(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(SCRIPTS / "compare_commits.sh"), "run", str(tmp_path)],
        env={"FASTALIGN_VENV": str(Path(sys.executable).parents[1]), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "compare_commits.sh run SOURCE FOLDER" in done.stderr
