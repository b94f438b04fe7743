"""Reward models in the report: their table with baselines, and two pictures."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastalign.report.page import render
from fastalign.report.reward import (
    REWARD_COLUMNS,
    accuracy_by_length,
    by_length,
    calibration,
    reliability,
    reward_table,
)
from fastalign.report.runs import RunRecord, read_run


def make_run(folder: Path, name: str, measures: dict[str, Any]) -> RunRecord:
    run = folder / name
    (run / "eval").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"run": {"dir": name}}))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "step_seconds": 2.0}\n')
    (run / "eval/eval.json").write_text(json.dumps(measures))
    return read_run(run)


def estimates(**values: float) -> dict[str, float]:
    return {k: v for name, value in values.items() for k, v in ((name, value), (f"{name}_se", 0.5))}


def length_bin(low: int, high: int, longer: tuple[Any, int], shorter: tuple[Any, int]) -> Any:
    return {
        "low": low,
        "high": high,
        "accuracy_longer_won": longer[0],
        "count_longer_won": longer[1],
        "accuracy_shorter_won": shorter[0],
        "count_shorter_won": shorter[1],
    }


@pytest.fixture
def runs(tmp_path: Path) -> list[RunRecord]:
    judged = {
        **estimates(accuracy=0.875, log_likelihood=-0.5, log_likelihood_untied=-0.25),
        **estimates(accuracy_longer_won=0.9375, longer_wins_accuracy=0.75),
        **estimates(bag_of_words_accuracy=0.8125),
        "calibration_error": 0.0625,
        "calibration_bins": [
            {"low": 0.5, "high": 0.55, "count": 4, "confidence": 0.53, "accuracy": 0.5},
            {"low": 0.95, "high": 1.0, "count": 16, "confidence": 0.97, "accuracy": 0.75},
        ],
        "length_bins": [
            length_bin(0, 0, (None, 0), (None, 0)),
            length_bin(1, 9, (0.9, 10), (0.2, 5)),
            length_bin(10, 30, (1.0, 4), (None, 0)),
        ],
    }
    policy = estimates(accuracy=0.5, reward=1.0, kl=2.0)
    return [make_run(tmp_path, "rm$_", judged), make_run(tmp_path, "policy", policy)]


def test_the_table_has_the_run_and_its_baselines_and_no_policy(runs: list[RunRecord]) -> None:
    rows = reward_table(runs)
    assert rows == [
        (
            "rm$_",
            "0.875 ± 0.500",
            "0.938 ± 0.500",
            "",
            "-0.500 ± 0.500",
            "-0.250 ± 0.500",
            "0.062",
        ),
        ("rm$_: the longer wins", "0.750 ± 0.500", "", "", "", "", ""),
        ("rm$_: a bag of words", "0.812 ± 0.500", "", "", "", "", ""),
    ]
    assert {len(row) for row in rows} == {len(REWARD_COLUMNS)}
    assert reward_table(runs[1:]) == []


def test_the_page_shows_them_and_only_where_there_are_any(runs: list[RunRecord]) -> None:
    text = render(runs)
    assert "<h2>Calibration of reward models</h2>" in text
    assert "rm$_: a bag of words" in text
    # Two of the reward model, reward against KL; loss and time of a step for who has no script.
    assert text.count('<figure class="picture">') == 5
    assert "Calibration of reward models</h2>" not in render(runs[1:])
    assert reliability(runs[1:]) is None
    assert accuracy_by_length(runs[1:]) is None


def test_what_is_drawn_is_what_was_measured(runs: list[RunRecord]) -> None:
    points, curves = calibration(runs)
    assert [(curve.xs, curve.ys) for curve in curves] == [([0.53, 0.97], [0.5, 0.75])]
    assert [(p.x, p.y, p.errors[1]) for p in points] == [
        (0.53, 0.5, 0.25),
        (0.97, 0.75, pytest.approx(0.10825, abs=1e-5)),
    ]
    points, curves = by_length(runs)
    assert [(c.xs, c.ys, c.dashed) for c in curves] == [
        ([5.0, 20.0], [0.9, 1.0], False),
        ([5.0], [0.2], True),
    ]
    assert [(p.x, p.y, p.shape) for p in points] == [
        (5.0, 0.9, "triangle"),
        (20.0, 1.0, "triangle"),
        (5.0, 0.2, "down"),
    ]
    tips = re.findall('data-tip="(.*?)"', str(reliability(runs)))
    assert tips == [
        "rm$_: expected 0.53, won 0.50 of 4 pairs",
        "rm$_: expected 0.97, won 0.75 of 16 pairs",
    ]
