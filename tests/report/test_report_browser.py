"""The report in a real Chromium: values, switches, zoom, samples, both themes, and live."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastalign.cli.main import main
from fastalign.compare.app import application
from fastalign.report.page import render
from fastalign.report.runs import read_run, read_runs
from fastalign.report.watch import watched
from tests import browser
from tests.browser import opened, violations

pytestmark = browser.needs_chromium
ATTACK = "<img src=x onerror=alert(1)>"
LOSS = "charts.find((chart) => chart.figure.dataset.chart === '0/loss').plot"


def put_run(folder: Path, name: str, config: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    run = folder / name
    (run / "eval").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def dpo(folder: Path, name: str, beta: float) -> Path:
    rows: list[dict[str, Any]] = [
        {"step": n, "loss": 1.0 / n, "grad_norm": 1.0, "skipped": int(n == 7), "step_seconds": 1.0}
        for n in range(1, 41)
    ]
    for row in rows[9::10]:
        row["eval_loss"] = 0.5
    return put_run(folder, name, {"loss": {"name": "dpo", "beta": beta}}, rows)


def ppo(folder: Path) -> Path:
    rows = [
        {"step": n, "reward": 0.1 * n, "step_seconds": 2.0, "collapsed": int(n > 15)}
        for n in range(1, 21)
    ]
    run = put_run(folder, "ppo", {"ppo": {}, "kl": {"coefficient": 0.1}}, rows)
    samples = [
        {
            "step": step,
            "held_out": number == 0,
            "prompt": f"Question {number} {ATTACK}",
            "completion": f"answer of {step}",
            "reward": step + number,
        }
        for step in (1, 10, 20)
        for number in range(3)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    measures = {"reward": 2.0, "reward_se": 0.1, "kl": 3.0, "kl_se": 0.2, "collapsed": True}
    (run / "eval/eval.json").write_text(json.dumps(measures))
    return run


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [dpo(tmp_path, "weak", 0.1), dpo(tmp_path, "strong", 0.3), ppo(tmp_path)]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.launched() as found:
        yield found


def page_of(chromium: Any, folders: list[Path], width: int = 1280, **options: Any) -> Any:
    out = folders[0].parent / "report.html"
    out.write_text(render(read_runs(folders)))
    page = opened(chromium, out.as_uri(), width, **options)
    if options.get("java_script_enabled", True):
        page.locator("[data-chart='0/loss']").scroll_into_view_if_needed()  # by which it is drawn
        page.locator("[data-chart='0/loss'] canvas").wait_for()
    return page


def test_values_are_read_by_pointer_and_by_keys(chromium: Any, folders: list[Path]) -> None:
    page = page_of(chromium, folders)
    figure = page.locator("[data-chart='0/loss']")
    legend = figure.locator(".live")
    assert legend.locator("li").all_text_contents() == [
        *("weak 0.025 at 40", "weak, held out 0.5 at 40"),
        *("strong 0.025 at 40", "strong, held out 0.5 at 40"),
    ]
    over = figure.locator(".u-over")
    over.hover(position={"x": 1, "y": 60})
    assert "weak 1 at 1" in legend.text_content()
    assert "weak, held out 0.5 at 10" in legend.text_content()
    # The other charts of the same steps follow.
    assert "at 1" in page.locator("[data-chart='0/grad_norm'] .live li").first.text_content()
    figure.locator(".plot").focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.getElementById('status').textContent.includes('at 7')")
    assert "weak 0.1429 at 7" in legend.text_content()
    note = page.locator("[data-chart='0/grad_norm'] .event-note").inner_text()
    assert "weak, step 7: this step changed no weight" in note
    assert page.problems == []


def test_runs_are_switched_off_everywhere_and_curves_smoothed(
    chromium: Any, folders: list[Path]
) -> None:
    page = page_of(chromium, folders)
    shown = f"() => {LOSS}.series.map((series) => series.show)"
    assert page.evaluate(shown) == [True, True, False, True, False, True, False, True, False]
    page.get_by_label("strong", exact=True).uncheck()
    assert page.evaluate(shown) == [True, True, False, True, False, False, False, False, False]
    assert page.locator("figure .live li.off").first.inner_text().startswith("strong")
    page.get_by_label("ppo", exact=True).uncheck()
    assert not page.locator("svg .mark.run-2").first.is_visible()
    page.locator("#smoothing").fill("0.5")
    assert page.evaluate(shown)[:3] == [True, True, True]
    smooth = f"() => {LOSS}.data[2].slice(0, 3)"
    # Sums of weights 1/2, 3/4, 7/8: 1, (1/4 + 1/4) / (3/4), (1/8 + 1/8 + 1/6) / (7/8)
    assert page.evaluate(smooth) == pytest.approx([1.0, 2 / 3, 10 / 21], rel=1e-5)
    assert page.problems == []


def test_a_zoom_holds_for_an_algorithm_s_charts_and_is_undone(
    chromium: Any, folders: list[Path]
) -> None:
    page = page_of(chromium, folders)
    ranges = "() => charts.filter((c) => c.spec.section === 0).map((c) => c.plot.scales.x.max)"
    assert set(page.evaluate(ranges)) == {40}
    box = page.locator("[data-chart='0/loss'] .u-over").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60, steps=5)
    page.mouse.up()
    zoomed = set(page.evaluate(ranges))
    assert len(zoomed) == 1
    assert 15 < zoomed.pop() < 25
    page.get_by_role("button", name="Reset zoom").click()
    assert set(page.evaluate(ranges)) == {40}
    page.locator("[data-chart='0/loss'] .plot").focus()
    page.keyboard.press("+")
    assert set(page.evaluate(ranges)) != {40}
    page.keyboard.press("0")
    assert set(page.evaluate(ranges)) == {40}
    assert page.problems == []


def test_samples_are_filtered_and_sorted(chromium: Any, folders: list[Path]) -> None:
    page = page_of(chromium, folders)

    def rows() -> list[Any]:
        visible = page.locator("#samples tbody tr:visible").all()
        names = ("data-step", "data-reward")
        return [tuple(row.get_attribute(name) for name in names) for row in visible]

    assert len(rows()) == 9
    page.get_by_label("Order").select_option("reward down")
    assert [reward for _, reward in rows()][:3] == ["22", "21", "20"]
    page.get_by_label("Reward from").fill("11")
    page.get_by_label("to", exact=True).fill("20")
    assert rows() == [("20", "20"), ("10", "12"), ("10", "11")]
    assert page.locator("#samples-count").inner_text() == "3 of 9 samples"
    page.get_by_role("combobox", name="Prompts").select_option("held-out")
    assert rows() == [("20", "20")]
    page.get_by_role("combobox", name="Prompts").select_option("")
    page.get_by_label("Text").fill("QUESTION 1")
    assert rows() == [("10", "11")]
    assert page.problems == []


def test_marks_tell_their_run_on_hover_and_focus(chromium: Any, folders: list[Path]) -> None:
    page = page_of(chromium, folders)
    mark = page.locator("svg .mark.run-2[data-tip]")
    mark.focus()
    tip = page.locator("#tip")
    assert "ppo (ppo, 0.1, collapsed): reward 2.00 ± 0.10, KL 3.00 ± 0.20" in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    mark.hover()
    assert tip.is_visible()


def test_runs_of_one_step_and_without_a_number_are_shown(chromium: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": 1, "loss": 0.5}]
    nothing = [{"step": n, "loss": "nan"} for n in (1, 2)]
    folders = [put_run(tmp_path, "one", {}, rows), put_run(tmp_path, "nan", {}, nothing)]
    page = page_of(chromium, folders)
    assert page.locator("[data-chart='0/loss'] .live li").all_text_contents() == [
        *("one 0.5 at 1", "nan \u2013 at 2")
    ]
    assert page.problems == []


def test_without_javascript_the_pictures_are_svg(chromium: Any, folders: list[Path]) -> None:
    page = page_of(chromium, folders, java_script_enabled=False)
    loss = page.locator("[data-chart='0/loss'] svg[aria-label='Loss against the step']")
    assert loss.is_visible()
    assert loss.locator("path.line").count() == 4
    assert page.locator("#samples tbody tr").count() == 9
    assert not page.locator("#controls").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing_and_nothing_overflows(
    chromium: Any, folders: list[Path], width: int, scheme: str
) -> None:
    page = page_of(chromium, folders, width, color_scheme=scheme, bypass_csp=True)
    page.locator("details summary").first.click()
    assert violations(page) == ""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.problems == []
    (folders[2] / "config.yaml").write_text(yaml.safe_dump({"ppo": {}, "run": {"seed": 0}}))
    out = folders[0].parent / "frontier.html"
    assert main(["frontier", str(folders[2]), "--out", str(out), "--overwrite"]) == 0
    page = opened(chromium, out.as_uri(), width, color_scheme=scheme, bypass_csp=True)
    page.locator("svg .mark[data-tip]").first.hover()
    assert page.locator("#tip").is_visible()
    assert violations(page) == ""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.problems == []


def test_a_live_report_shows_newer_numbers_and_keeps_what_was_set(
    chromium: Any, folders: list[Path]
) -> None:
    run = folders[0]
    site = watched([str(run)], lambda version: render([read_run(run)], watch=version))
    (person,) = site.keys.annotators
    with browser.served(lambda port: application(site, ["127.0.0.1"], port)) as origin:
        page = opened(chromium, f"{origin}/?key={person.key}")
        page.locator("[data-chart='0/loss'] canvas").wait_for()
        page.locator("#smoothing").fill("0.5")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 41, "loss": 0.75}) + "\n")
        page.get_by_text("0.75 at 41").wait_for()
        assert page.locator("#smoothing").input_value() == "0.5"
        assert re.search("Live: looked at", page.locator("#watched").inner_text())
        assert page.problems == []
    page.get_by_text("The server has ended").wait_for()
