"""Runs with labels become points with errors, a table, and curves that start at one point."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastalign.cli.main import main
from fastalign.evaluation.statistics import estimate
from fastalign.report.frontier import (
    draw_frontier,
    find_origin,
    frontier_points,
    frontier_table,
    read_frontier,
)
from fastalign.report.svg import covered, outside, place_labels


def put(
    folder: Path, name: str, values: dict[str, Any], settings: dict[str, Any] | None = None
) -> Path:
    """A run's folder with an evaluation and, where it has a config, metrics."""
    run = folder / name
    (run / "eval").mkdir(parents=True)
    if values:
        (run / "eval/eval.json").write_text(json.dumps(values))
    if settings is not None:
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    return run


def measures(reward: float, kl: float, **more: Any) -> dict[str, Any]:
    return {"reward": reward, "reward_se": 0.25, "kl": kl, "kl_se": 0.125, **more}


BEST_OF = {
    "config": {"model": {"path": "sft/model"}, "reference": {"path": "sft/model"}},
    "best_of_n": [
        {"n": 1, "reward": -1.0, "reward_se": 0.25, "kl_bound": 0.0},
        {"n": 4, "reward": 2.0, "reward_se": 0.5, "kl_bound": math.log(4) - 0.75},
    ],
}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    put(tmp_path, "sft", measures(-1.0, 0.0, **BEST_OF))
    for seed, (reward, kl) in enumerate([(4.0, 6.0), (5.0, 8.0), (6.0, 7.0)]):
        put(tmp_path, f"dpo-0.1-{seed}", measures(reward, kl))
    put(tmp_path, "dpo-1-0", measures(3.0, 2.0))
    put(tmp_path, "ppo-0", measures(7.0, 9.0, collapsed=True))
    put(tmp_path, "ppo-1", measures(1.0, 5.0))
    put(tmp_path, "ppo-2", {})
    (tmp_path / "ppo-2/metrics.jsonl").write_text('{"step": 1, "collapsed": "entropy 0.01"}\n')
    entries = [
        {"method": "SFT", "run": "sft"},
        {"method": "best of n", "strength": 4, "run": "sft", "best_of": 4},
        *({"method": "DPO", "strength": 0.1, "seed": s, "run": f"dpo-0.1-{s}"} for s in range(3)),
        {"method": "DPO", "strength": 1, "seed": 0, "run": "dpo-1-0/eval/eval.json"},
        *({"method": "PPO", "strength": "weak", "seed": s, "run": f"ppo-{s}"} for s in range(3)),
    ]
    (tmp_path / "runs.json").write_text(json.dumps(entries))
    (tmp_path / "runs.jsonl").write_text("\n\n".join(json.dumps(entry) for entry in entries))
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(entries))
    return tmp_path


def test_seeds_are_averaged_and_collapses_counted(runs: Path) -> None:
    points = frontier_points(read_frontier([runs / "runs.jsonl"]))
    for other in ("runs.json", "runs.yaml"):
        assert frontier_points(read_frontier([runs / other])) == points
    sft, best, strong, weak, ppo = points
    assert (sft.reward, sft.reward_se, sft.kl, sft.error_over) == (-1.0, 0.25, 0.0, "prompts")
    assert (best.reward, best.reward_se, best.kl_is_bound) == (2.0, 0.5, True)
    assert best.kl == pytest.approx(math.log(4) - 0.75)
    assert (strong.strength, strong.reward, strong.kl, strong.num_runs) == (0.1, 5.0, 7.0, 3)
    assert strong.reward_se == pytest.approx(1 / math.sqrt(3))
    assert strong.error_over == "runs"
    assert (weak.strength, weak.reward_se, weak.error_over) == (1.0, 0.25, "prompts")
    assert (ppo.num_runs, ppo.num_measured, ppo.num_collapsed) == (3, 2, 2)
    assert ppo.collapse_rate == pytest.approx(2 / 3)
    assert ppo.reward == estimate([7.0, 1.0]).mean
    table = frontier_table(points)
    assert table[1] == ("best of n", "4", "2.00 ± 0.50", "≤ 0.64", "1", "0 of 1 (0%)")
    assert table[2] == ("DPO", "0.1", "5.00 ± 0.58", "7.00 ± 0.58", "3", "0 of 3 (0%)")
    assert table[4] == ("PPO", "weak", "4.00 ± 3.00", "7.00 ± 2.00", "3", "2 of 3 (67%)")


def test_curves_start_at_the_origin_and_end_far_from_it(runs: Path) -> None:
    points = frontier_points(read_frontier([runs / "runs.json"]))
    origin = find_origin(points, "sft")
    assert origin is points[0]
    (axes,) = draw_frontier(points, origin).axes
    curves = {
        tuple(zip(*line.get_data(), strict=True)): line.get_linestyle()
        for line in axes.lines
        if len(line.get_xdata()) > 1 and line.get_color() != "black"
    }
    best = math.log(4) - 0.75
    assert curves == {
        ((0.0, -1.0), (best, 2.0)): "--",
        ((0.0, -1.0), (2.0, 3.0), (7.0, 5.0)): "-",
        ((0.0, -1.0), (7.0, 4.0)): "-",
    }
    assert [text.get_text() for text in axes.texts] == ["4", "1", "0.1", "weak", ""]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["best of n (KL: the bound)", "DPO", "PPO", "SFT"]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [tuple(line.get_xdata()) for line in hollow] == [(7.0,)]
    (axes,) = draw_frontier(points, find_origin(points, "none")).axes
    assert not [line for line in axes.lines if line.get_color() == "black"]


def test_folders_are_labelled_by_their_settings(tmp_path: Path) -> None:
    put(tmp_path, "a", measures(-1.0, 0.0, **BEST_OF), {"run": {"seed": 3}})
    ipo = {"loss": {"name": "ipo_sum", "beta": 0.05}, "run": {"seed": 1}}
    put(tmp_path, "b", measures(1.0, 2.0), ipo)
    settings = {"ppo": {"epochs": 4}, "kl": {"coefficient": 0.2}, "run": {"seed": 2}}
    ppo = put(tmp_path, "c", measures(3.0, 4.0), settings)
    (ppo / "metrics.jsonl").write_text('{"collapsed": 2}\n{"collapsed": 0}\n{"step": 3}\n')
    put(tmp_path, "d", measures(3.0, 4.0), {"pairs": {}, "loss": {"name": "dpo", "beta": 0.1}})
    sources = ["a", "b/eval/eval.json", "c", "d"]
    found = read_frontier([tmp_path / source for source in sources])
    assert not any(run.collapsed for run in found), "the policy recovered"
    assert [(run.method, run.strength, run.seed, run.kl_is_bound) for run in found] == [
        ("sft", None, 3, False),
        ("best of n", 4.0, 3, True),
        ("ipo_sum", 0.05, 1, False),
        ("ppo", 0.2, 2, False),
        ("online dpo", 0.1, None, False),
    ]
    assert found[2].reward == (1.0, 0.25)


def test_yaml_that_reads_a_number_as_text_is_understood(tmp_path: Path) -> None:
    put(tmp_path, "a", measures(1.0, 2.0))
    (tmp_path / "runs.yaml").write_text("- {method: DPO, strength: 1e-3, run: a}\n")
    assert read_frontier([tmp_path / "runs.yaml"])[0].strength == 1e-3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "expected a list of runs (method, strength, seed, run) or an eval.json, got dict"),
        ("[", "runs.json: damaged"),
        ('[{"method": "DPO", "run": "a", "sed": 1}]', "entry 1: expected the keys method"),
        ('[{"run": "a"}]', "entry 1: method: expected str, got None"),
        ('[{"method": "DPO"}]', "entry 1: run: expected str, got None"),
        ('[{"method": "DPO", "run": "a", "seed": 0.5}]', "seed: expected int, None, got 0.5"),
        ('[{"method": "DPO", "run": "a", "seed": true}]', "seed: expected int, None, got True"),
        ('[{"method": "DPO", "run": "none"}]', "evaluate the run with `fastalign eval`"),
        ('[{"method": "DPO", "run": "half"}]', "expected a finite kl in the evaluation"),
        ('[{"method": "DPO", "run": "broken"}]', "eval.json: a file of the run is damaged"),
        ('[{"method": "B", "run": "a", "best_of": 3}]', "the evaluation has no best of 3"),
        (
            '[{"method": "D", "run": "a", "seed": 0}, {"method": "D", "run": "a", "seed": 0}]',
            "runs.json: entry 2 (a): method D, strength None, seed 0 is there already",
        ),
    ],
)
def test_a_list_that_cannot_be_read_is_one_line(
    tmp_path: Path,
    content: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "a", measures(1.0, 2.0))
    put(tmp_path, "half", {"reward": 1.0, "kl": math.nan})
    put(tmp_path, "broken", measures(1.0, 2.0))
    (tmp_path / "broken/eval/eval.json").write_text('{"reward":')
    (tmp_path / "runs.json").write_text(content)
    assert main(["frontier", "runs.json"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_a_run_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    run = put(tmp_path, "a", measures(1.0, 2.0), {"run": {"seed": 0}})
    with pytest.raises(ValueError, match=r"method sft, strength None, seed 0 is there already"):
        read_frontier([run, run])


def test_the_command_writes_page_picture_and_table(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    assert main(["frontier", "runs.yaml", "--out", "out/frontier.html"]) == 0
    assert "2 of 3 (67%)" in capsys.readouterr().out
    page = (runs / "out/frontier.html").read_text()
    assert page.count('<figure class="picture">') == 1
    tips = re.findall('data-tip="(.*?)"', page)
    assert len(tips) == 5
    (tip,) = [tip for tip in tips if tip.startswith("DPO, 0.1: reward 5.00 ± 0.58, KL 7.00 ± 0.58")]
    assert "dpo-0.1-0" in tip
    assert "β of a loss" in page
    assert "<td>DPO</td><td>0.1</td>" in page
    rows = json.loads((runs / "out/frontier.table.json").read_text())
    assert [row["method"] for row in rows] == ["SFT", "best of n", "DPO", "DPO", "PPO"]
    assert rows[1]["kl_se"] is None
    assert rows[4]["collapse_rate"] == pytest.approx(2 / 3)
    for name, begin in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("c.pdf", b"%PDF")):
        assert main(["frontier", "runs.yaml", "--out", name]) == 0
        assert (runs / name).read_bytes().startswith(begin)
    assert main(["frontier", "runs.yaml", "--out", "f.gif"]) == 2
    assert main(["frontier", "none.yaml"]) == 2
    assert main(["frontier"]) == 2
    err = capsys.readouterr().err
    for words in ("expected .html, .png", "none.yaml: no such file or folder", "got none"):
        assert words in err


def test_a_method_s_name_is_text_not_markup(tmp_path: Path) -> None:
    put(tmp_path, "a", measures(1.0, 2.0))
    entry = {"method": "<b>$x$", "strength": "<i>$", "run": "a"}
    (tmp_path / "runs.json").write_text(json.dumps([entry]))
    assert main(["frontier", str(tmp_path / "runs.json"), "--out", str(tmp_path / "f.html")]) == 0
    assert "&lt;b&gt;$x$" in (tmp_path / "f.html").read_text()


def test_without_matplotlib_pages_are_made_and_a_line_says_what_a_picture_needs(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("fastalign.report.frontier.find_spec", lambda name: None)
    put(runs, "run", measures(1.0, 2.0), {"run": {"seed": 0}})
    assert main(["report", "run", "--out", "report.html"]) == 0
    assert main(["frontier", "runs.yaml", "--out", "page.html"]) == 0
    assert main(["frontier", "runs.yaml", "--out", "page.png"]) == 2
    assert capsys.readouterr().err == (
        "fastalign frontier: out: .png needs matplotlib (pip install 'fastalign[report]'); .html "
        "does not\n"
    )


def test_labels_do_not_cover_one_another_or_the_marks() -> None:
    points = [(100.0 + 3 * n, 100.0 + 2 * (n % 3)) for n in range(8)]
    widths, inside = [24.0] * len(points), (0.0, 0.0, 400.0, 300.0)
    corners = place_labels(points, widths, inside)
    boxes = [(left, bottom - 12, left + 24, bottom) for left, bottom in corners]
    marks = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for number, box in enumerate(boxes):
        assert outside(box, inside) == 0
        assert all(covered(box, other) == 0 for other in (*boxes[:number], *marks))
    # At the edge it turns inwards.
    ((left, bottom),) = place_labels([(398.0, 3.0)], [24.0], inside)
    assert left + 24 <= 400
    assert bottom - 12 >= 0
