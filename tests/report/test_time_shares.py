"""Where an iteration's time goes: the numbers, the picture, and what trainers really log."""

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastalign.report import speed
from fastalign.report.metric_table import MetricTable
from fastalign.report.page import render
from fastalign.report.runs import RunRecord, read_run
from fastalign.report.speed import phase_seconds, time_table
from fastalign.rollouts import EngineSpec, PolicyAccess, SyncedSampler, policy_tensors
from fastalign.trainers import train_ppo
from fastalign.trainers.sampling import rollout
from tests.rollouts.test_synced import FakeEngine
from tests.small_runs import _one_thread, folder, ppo_config

__all__ = ["_one_thread", "folder"]


def row(step: int, seconds: float, *phases: float, **others: Any) -> dict[str, Any]:
    names = ("generate", "score", "prepare", "update", "sync")
    logged = {f"time/{name}_seconds": value for name, value in zip(names, phases, strict=False)}
    return {"step": step, "step_seconds": seconds, **logged, **others}


def run_of(name: str, *rows: dict[str, Any]) -> RunRecord:
    return RunRecord(name=name, config={}, metrics=MetricTable(rows), evaluation=None, samples=[])


# Means of the two: generate 5 with a sync of 2, score 1, prepare 2, update 8; of 20, so other 4.
ENGINE = run_of(
    "engine", row(1, 22.0, 6.0, 1.0, 3.0, 9.0, 4.0), row(2, 18.0, 4.0, 1.0, 1.0, 7.0, 0.0)
)
STEP = {"time/gradient_seconds": 6.0, "time/optimizer_seconds": 1.0}
TRAINED = run_of("trained", row(1, 8.0, **STEP))
EMBEDDED = run_of("embedded", row(1, 10.0, 5.0, 0.0, 1.0, 4.0))
SFT = run_of("sft", row(1, 3.0), row(2, 3.0))
BARS = {
    "generate": [(0.0, 0.15), (0.0, 0.5)],
    "sync": [(0.15, 0.1), (0.5, 0.0)],
    "score": [(0.25, 0.05), (0.5, 0.0)],
    "prepare": [(0.3, 0.1), (0.5, 0.1)],
    "update": [(0.4, 0.4), (0.6, 0.4)],
    "gradient": [(0.8, 0.0), (1.0, 0.0)],
    "optimizer": [(0.8, 0.0), (1.0, 0.0)],
    "other": [(0.8, 0.2), (1.0, 0.0)],
}


def test_the_numbers_are_means_and_what_is_left_is_other() -> None:
    assert phase_seconds(ENGINE) == {
        "generate": 3.0,
        "sync": 2.0,
        "score": 1.0,
        "prepare": 2.0,
        "update": 8.0,
        "gradient": 0.0,
        "optimizer": 0.0,
        "other": 4.0,
    }
    none = ("0.0%", "0.0%")
    assert time_table([ENGINE, SFT, EMBEDDED, TRAINED]) == [
        ("engine", "20.00", "15.0%", "10.0%", "5.0%", "10.0%", "40.0%", *none, "20.0%"),
        ("embedded", "10.00", "50.0%", "0.0%", "0.0%", "10.0%", "40.0%", *none, "0.0%"),
        ("trained", "8.00", *(*none, *none, "0.0%"), "75.0%", "12.5%", "12.5%"),
    ]


@pytest.mark.parametrize(
    "bad",
    [
        row(3, 5.0, 1.0, 1.0, 1.0),
        row(3, 5.0, 1.0, 1.0, 1.0, "nan"),  # type: ignore[arg-type]
        row(3, 5.0, 1.0, 1.0, 1.0, 1.0, None),  # type: ignore[arg-type]
        row(3, 5.0, 1.0, 1.0, 1.0, -1.0),
        {**row(3, 5.0, 1.0, 1.0, 1.0, 1.0), "step_seconds": "inf"},
        {"step": 3, "collapsed": True},
    ],
    ids=["no update", "nan", "sync unknown", "negative", "inf", "nothing"],
)
def test_an_iteration_that_does_not_say_all_counts_for_nothing(bad: dict[str, Any]) -> None:
    assert phase_seconds(
        replace(ENGINE, metrics=MetricTable([*ENGINE.metrics, bad]))
    ) == phase_seconds(ENGINE)
    assert phase_seconds(run_of("bad", bad)) is None


def test_the_bars_lie_behind_one_another() -> None:
    bars = speed.time_bars([ENGINE, SFT, EMBEDDED])
    assert [name for name, _ in bars] == ["engine", "embedded"]
    for phase, expected in BARS.items():
        for (_, parts), (left, width) in zip(bars, expected, strict=True):
            drawn = {name: (start, end - start) for name, start, end in parts}
            assert drawn[phase] == pytest.approx((left, width))
    picture = str(speed.time_picture([ENGINE, SFT, EMBEDDED]))
    found = [
        (tip, float(left), float(width))
        for left, width, tip in re.findall(
            r'<rect class="bar [^>]* x="([\d.]+)"[^>]* width="([\d.]+)"[^>]*data-tip="(.*?)"',
            picture,
        )
    ]
    tips = [tip for tip, _, _ in found]
    assert tips[:3] == ["engine: generate 15.0%", "engine: sync 10.0%", "engine: score 5.0%"]
    assert "embedded: sync" not in picture
    (_, first, wide), (_, second, _) = found[:2]
    assert second == pytest.approx(first + wide, abs=0.2), "side by side"
    assert wide / found[1][2] == pytest.approx(1.5, abs=0.02), "as long as their shares"


def test_the_page_has_them_for_runs_that_logged_them() -> None:
    assert "Time of an iteration" not in render([SFT])
    text = render([SFT, ENGINE])
    part = text[text.index("<h2>Time of an iteration</h2>") : text.index("<h2>Settings</h2>")]
    assert part.count('<figure class="picture">') == 1
    cells = re.findall(r"<td[^>]*>(.*?)</td>", part)
    shares = ["15.0%", "10.0%", "5.0%", "10.0%", "40.0%", "0.0%", "0.0%", "20.0%"]
    assert cells == ["engine", "20.00", *shares]


SYNC, GENERATE = 1000.0, 100.0  # seconds that a clock says a fake engine takes


def test_a_real_run_s_sync_is_not_counted_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, added = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + added[0])
    call = FakeEngine._call

    def slow(self: FakeEngine, name: str) -> None:
        added[0] += {"sync": SYNC, "generate": GENERATE}.get(name, 0.0)
        call(self, name)

    def open_fake(name: str, spec: EngineSpec, policy: PolicyAccess, **_: Any) -> SyncedSampler:
        model = policy._model
        engine = FakeEngine()
        engine.model = type(model)(model.config).eval()
        engine.sync_weights(policy_tensors(model), -1)
        return SyncedSampler(policy, engine, num_rebuilds=0, max_difference=1e-3)

    monkeypatch.setattr(FakeEngine, "_call", slow)
    monkeypatch.setattr(rollout, "open_engine", open_fake)
    config = replace(ppo_config(folder, "ppo", max_steps=2), sampler="vllm")
    train_ppo(replace(config, reward=replace(config.reward, normalise=False)))
    found = phase_seconds(read_run(folder / "ppo"))
    assert found is not None
    assert found["sync"] == pytest.approx(SYNC, rel=0.05)
    assert found["generate"] == pytest.approx(GENERATE, abs=0.3 * GENERATE)
    assert 0 < sum(found[name] for name in ("score", "prepare", "update", "other")) < GENERATE


def test_a_run_without_an_engine_has_no_sync(folder: Path) -> None:
    train_ppo(ppo_config(folder, "ppo", max_steps=2))
    record = read_run(folder / "ppo")
    found = phase_seconds(record)
    assert found is not None
    assert found["sync"] == 0
    assert min(found[name] for name in ("generate", "score", "prepare", "update")) > 0
    assert sum(found.values()) == pytest.approx(record.seconds / 2)
