"""The page: complete, self-contained, and deaf to what models wrote."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastalign.report.charts import sections
from fastalign.report.page import (
    MOST_CHARACTERS,
    NUM_ROLLOUTS_SHOWN,
    over_time,
    render,
    rollout_rows,
    static,
    table,
)
from fastalign.report.pictures import reward_points
from fastalign.report.runs import labels_of, read_run, read_runs
from fastalign.report.summary import difference, differing_settings, provenance, verdict
from fastalign.report.svg import run_class
from fastalign.runs.config import UnpairedDataConfig, config_to_dict
from fastalign.trainers.kto.config import KTOConfig, KTOLoss

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def make_run(folder: Path, name: str, *, evaluated: bool = True) -> Path:
    run = folder / name
    (run / "eval").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"run": {"dir": ATTACK}}))
    rows = [
        {"step": step, "loss": 1.0 / step, "rewards/margins": 0.1 * step, "step_seconds": 2.0}
        for step in range(1, 6)
    ]
    rows[3]["loss"] = "nan"
    rows[4]["eval_loss"] = 0.3
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"ste')
    if evaluated:
        measures = {"reward": 1.25, "reward_se": 0.125, "kl": 3.0, "kl_se": 0.5}
        (run / "eval/eval.json").write_text(json.dumps(measures))
        samples = [
            {
                "prompt": "The $x$",
                "completion": f" {name} {ATTACK}",
                "finish_reason": "length",
                "reward": 0.5,
            },
            {"prompt": "The $x$", "completion": " second", "finish_reason": "stop", "reward": 0.5},
        ]
        (run / "eval/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return run


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path, name)) for name in ("one", "two$_")]
    text = render(runs)
    page = Page(text)
    assert all("onerror" not in attributes for _, attributes in page.tags)
    links = [
        v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "href")
    ]
    assert links == ["data:,", "#main"]
    scripts = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    assert scripts == [static("uPlot.iife.min.js"), static("report.js")]
    # Reward against KL, and for who has no script loss, margins, time of a step.
    assert text.count('<figure class="picture">') == 4
    assert text.count("<noscript>") == text.count('<div class="plot') == 3
    assert "&lt;script&gt;" in text
    assert "1.25 ± 0.12" in text
    assert " second" not in re.sub("<script.*?</script>", "", text, flags=re.DOTALL)
    assert "[…]" in text


def test_the_script_s_data_are_the_metrics(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a")
    rows: list[dict[str, Any]] = [
        {"step": 10 * n, "loss": 1 / n, "eval_loss": 2.0} for n in (1, 2, 3)
    ]
    rows.append({"step": 40, "loss": "nan"})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = data_of([read_run(run)])
    assert data["runs"] == ["a"]
    assert data["charts"]["0/loss"]["lines"] == [
        {"run": 0, "heldOut": False, "x": {"first": 10, "by": 10}, "y": [1, 0.5, 0.33333, None]},
        {"run": 0, "heldOut": True, "x": {"first": 10, "by": 10}, "y": [2, 2, 2]},
    ]


def data_of(runs: list[Any]) -> Any:
    """What a page hands to its script."""
    found = re.search('<script type="application/json" id="data">(.*?)</script>', render(runs))
    assert found
    assert not set("<>&") & set(found[1]), "nothing in it can end the element, or begin a comment"
    return json.loads(found[1])


def test_names_in_the_script_s_data_stay_data(tmp_path: Path) -> None:
    run = replace(read_run(make_run(tmp_path, "a")), name="</script><!--<script &<b>\x1b")
    assert data_of([run])["runs"] == ["</script><!--<script &<b>\\x1b"]


def test_a_collapse_is_marked_where_it_began(tmp_path: Path) -> None:
    flags = [0, 1, 2, 0, 0, "entropy 0.01", True]
    rows = [{"step": n, "loss": 1.0, "collapsed": flag} for n, flag in enumerate(flags, 1)]
    run = read_run(write_run(tmp_path, "ppo", {"ppo": {}}, rows))
    (chart,) = [chart for chart in sections([run])[0].charts if chart.key == "loss"]
    assert [(mark.step, mark.words) for mark in chart.marks] == [
        (2, "the policy looks collapsed"),
        (6, "the policy looks collapsed: entropy 0.01"),
    ]
    assert "ppo: the policy began to look collapsed at step 2, 6." in render([run])


def test_a_run_has_one_colour_and_its_algorithm_s_charts(pipeline: list[Path]) -> None:
    runs = [read_run(run) for run in pipeline]
    for section in sections(runs):
        assert all(line.run in section.runs for chart in section.charts for line in chart.lines)
        assert all(runs[line.run].name == line.name for c in section.charts for line in c.lines)
    assert sorted(place for section in sections(runs) for place in section.runs) == [0, 1, 2, 3]
    points, _ = reward_points(runs)
    assert {p.label: p.css for p in points if p.label} == {"sft": "run-0", "dpo": "run-1"}
    assert [run_class(n) for n in (9, 10, 11)] == ["run-9", "run-0 again", "run-1 again"]


def test_the_verdict_says_what_was_trained_and_how_much_better_it_is(pipeline: list[Path]) -> None:
    config = {
        "model": {"path": str(pipeline[0] / "model")},
        "data": {"train": str(pipeline[0] / "data" / "pairs.jsonl")},
        "loss": {"name": "dpo", "beta": 0.1},
    }
    (pipeline[1] / "config.yaml").write_text(yaml.safe_dump(config))
    first, second = verdict([read_run(run) for run in pipeline])
    trained = "was trained from sft/model on data/pairs.jsonl"
    assert first == f"dpo (DPO, β 0.1) {trained}: 2 steps in 3 s."
    assert second == (
        "Reward 6.00 ± 0.20, -1.00 before (sft): +7.00; KL to the reference 7.00 ± 0.30 nats per "
        "answer."
    )
    assert difference((1.0, 0.3), (0.0, 0.4)) == ("+1.00 (95 % interval +0.02 to +1.98)")
    assert "which could be chance" in difference((0.9, 0.3), (0.0, 0.4))
    _, second = verdict([read_run(pipeline[2])])
    assert second.startswith("Accuracy on held-out pairs: 0.91 at last. It has not been evaluated")
    assert verdict([]) == []


def test_a_run_of_kto_is_known_by_its_settings(tmp_path: Path) -> None:
    config = KTOConfig(data=UnpairedDataConfig("answers.jsonl"), loss=KTOLoss(beta=0.2))
    rows = [{"step": 1, "loss": 0.5, "kl": 0.1}]
    run = read_run(write_run(tmp_path, "kto", config_to_dict(config), rows))
    assert labels_of(run) == ("kto", 0.2, 0)
    (section,) = sections([run])
    assert section.title == "Answers found good or bad (KTO)"
    assert [chart.key for chart in section.charts] == ["loss", "kl"]
    assert verdict([run])[0].startswith("kto (KTO, β 0.2) was trained")


def test_settings_are_compared_where_they_differ(pipeline: list[Path]) -> None:
    for number, beta in enumerate((0.1, 0.3)):
        run = {"dir": f"runs/{number}", "seed": 1}
        config = {"loss": {"name": "dpo", "beta": beta}, "run": run}
        (pipeline[number] / "config.yaml").write_text(yaml.safe_dump(config))
    runs = [read_run(run) for run in pipeline[:2]]
    assert differing_settings(runs) == [("loss.beta", "0.1", "0.3")]
    text = render(runs)
    assert "<td>loss.beta</td><td>0.1</td><td>0.3</td>" in text
    assert "Settings that differ" not in render(runs[:1])


def test_where_a_run_comes_from(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a")
    (run / "began.txt").write_text("2026-12-01T06:12:44.120\n")
    machine = {"device": "cpu x86_64", "host": "lab", "num_processes": 2, "fastalign": "0.1.0"}
    (run / "machine.json").write_text(json.dumps(machine | {"commit": "b65c6be7e75bf3ed9d"}))
    (row,) = provenance([read_run(run)])
    dash = "\u2013"
    assert row == (
        *("a", dash, dash, "5", "2026-12-01 06:12", "10 s"),
        *("2 x cpu x86_64 on lab", "0.1.0 b65c6be7e75b"),
    )


def test_the_table(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path, "a")), read_run(make_run(tmp_path, "b", evaluated=False))]
    dash = "\u2013"
    assert table(runs) == [
        ("a", "sft", "1.25 ± 0.12", "3.00 ± 0.50", dash, "10"),
        ("b", "sft", dash, dash, dash, "10"),
    ]
    assert "Samples</h2>" in render(runs)
    assert "Samples</h2>" not in render(runs[1:])


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path, "a"))]
    assert render(runs) == render(runs)


def test_a_folder_that_is_no_run_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("no config.yaml")):
        read_run(tmp_path)
    run = make_run(tmp_path, "a")
    (run / "eval/eval.json").write_text("{")
    with pytest.raises(ValueError, match="a file of the run is damaged"):
        read_run(run)


PPO_NAMES = (
    *("objective/kl", "objective/entropy", "objective/non_score_reward"),
    *("objective/rlhf_reward", "objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg"),
    *("policy/entropy_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio"),
    *("val/ratio_var", "val/num_eos_tokens", "lr", "episode", "eps", "completions/mean_length"),
)


def write_run(
    folder: Path,
    name: str,
    config: dict[str, Any],
    rows: list[dict[str, Any]],
    evaluation: dict[str, Any] | None = None,
) -> Path:
    run = folder / name
    (run / "eval").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evaluation is not None:
        (run / "eval/eval.json").write_text(json.dumps(evaluation))
    return run


@pytest.fixture
def pipeline(tmp_path: Path) -> list[Path]:
    """One run of each kind, as a whole pipeline leaves them, with what goes wrong in such files."""

    def steps(*names: str, **last: Any) -> list[dict[str, Any]]:
        rows = [{"step": n, "step_seconds": 1.5, **dict.fromkeys(names, 0.1 * n)} for n in (1, 2)]
        rows[-1] |= last
        return rows

    found = {
        "reward": 6.0,
        "reward_se": 0.2,
        "kl": 7.0,
        "kl_se": 0.3,
        "accuracy": 0.8,
        "accuracy_se": 0.02,
    }
    reference = {"model": {"path": "sft"}, "reference": {"path": "sft"}}
    best_of = [{"n": n, "reward": float(n), "kl_bound": 0.1 * n} for n in (1, 4)]
    base = {"reward": -1.0, "kl": 0.0, "best_of_n": best_of, "config": reference}
    loss = {"name": "dpo", "beta": 0.1}
    ppo = steps(*PPO_NAMES, **{"objective/scores": "nan", "val/ratio": None})
    ppo.append({"step": 3, "collapsed": True})
    return [
        write_run(tmp_path, "sft", {"run": {"seed": 0}}, steps("loss", eval_loss=2.0), base),
        write_run(tmp_path, "dpo", {"loss": loss}, steps("loss", "rewards/margins"), found),
        write_run(
            tmp_path,
            "reward-model",
            {"loss": {"name": "rao_kupper", "nu": 1.5}},
            steps("loss", "accuracy", "margin", "mean_reward", eval_accuracy=0.91),
        ),
        write_run(
            tmp_path,
            "ppo",
            {"ppo": {}, "kl": {"coefficient": 0.05}},
            ppo,
            {**found, "accuracy": None, "kl": "inf"},
        ),
    ]


def test_a_whole_pipeline_stands_in_one_table(pipeline: list[Path]) -> None:
    dash = "\u2013"
    assert table([read_run(run) for run in pipeline]) == [
        ("sft", "sft", "-1.00", "0.00", dash, "3"),
        ("dpo", "dpo, 0.1", "6.00 ± 0.20", "7.00 ± 0.30", "0.80 ± 0.02", "3"),
        ("reward-model", "reward: rao_kupper", dash, dash, "0.91", "3"),
        ("ppo", "ppo, 0.05, collapsed", "6.00 ± 0.20", dash, dash, "3"),
    ]


def test_a_whole_pipeline_stands_on_one_page(pipeline: list[Path]) -> None:
    text = render([read_run(run) for run in pipeline])
    headings = re.findall("<h2>(.*?)</h2>", text)
    algorithms = [
        "Fine-tuning (SFT)",
        "Preference learning (DPO)",
        "Reward models",
        "Policy gradient (PPO, GRPO, RLOO)",
    ]
    assert headings == ["Runs", "Reward against KL", *algorithms, "Settings"]
    drawn = re.findall('data-chart="(.*?)"', text)
    assert [name for name in drawn if "step_seconds" not in name][:7] == [
        "0/loss",
        *("1/loss", "1/rewards/margins"),
        *("2/loss", "2/accuracy", "2/margin", "2/mean_reward"),
    ]
    # All that are named there and logged, and the time of a step; the critic's is not logged.
    assert len([name for name in drawn if name.startswith("3/")]) == 13
    only_ppo = render([read_run(pipeline[3])])
    assert re.findall("<h2>(.*?)</h2>", only_ppo) == ["Runs", algorithms[3], "Settings"]


def test_the_reference_s_best_of_n_is_a_curve(pipeline: list[Path]) -> None:
    points, (best,) = reward_points([read_run(run) for run in pipeline])
    assert (best.xs, best.ys, best.dashed) == ([0.1, 0.4], [1.0, 4.0], True)
    assert [(p.x, p.y) for p in points if p.shape == "cross"] == [(0.1, 1.0), (0.4, 4.0)]
    assert [(p.x, p.y, p.errors) for p in points if p.shape == "circle"] == [
        (0.0, -1.0, (0.0, 0.0)),
        (7.0, 6.0, (0.3, 0.2)),
    ]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = ("seed0/ppo", "seed1/ppo", "seed1/dpo")
    folders = [write_run(tmp_path, name, {}, [{"step": 1}]) for name in names]
    assert [run.name for run in read_runs(folders)] == ["seed0/ppo", "seed1/ppo", "dpo"]
    assert [run.name for run in read_runs([folders[0], folders[0]])] == ["ppo", "ppo"]


def test_rows_and_samples_of_another_shape_do_not_stop_the_page(tmp_path: Path) -> None:
    rows = [
        {"loss": 1.0},
        {"step": 2, "loss": None},
        {"step": 3, "loss": "what"},
        {"step": 4, "loss": 0.5},
    ]
    run = write_run(tmp_path, "a", {}, rows)
    (run / "config.yaml").write_text("")
    samples = [{"completion": "no prompt"}, {"prompt": "p", "completion": "c", "reward": "nan"}]
    (run / "eval/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    record = read_run(run)
    assert record.series("loss") == ([4], [0.5])
    page = render([record])
    assert "<td>p</td><td>c</td>" in page
    assert "no prompt" not in page
    (run / "metrics.jsonl").write_text("3\n")
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl: object 1: expected a JSON object, got 3"
    ):
        read_run(run)
    (run / "metrics.jsonl").write_text("")
    (run / "eval/eval.json").write_text("[]")
    with pytest.raises(ValueError, match=r"eval\.json: expected a JSON object, got list"):
        read_run(run)


def sampled_run(folder: Path, name: str, steps: list[int]) -> Path:
    """A run with completions of two held-out prompts, and two that it was trained on, at each."""
    run = make_run(folder, name, evaluated=False)
    rows = []
    for step in steps:
        for held_out in (False, True):
            for number in (1, 2):
                row = {
                    "step": step,
                    "held_out": held_out,
                    "prompt": f"prompt {number} {ATTACK}" if held_out else f"trained on {step}",
                    "completion": f"{name} answer {number} of {step} {ATTACK}",
                    "reward": step + 0.25,
                    "finish_reason": "length" if number == 2 else "stop",
                }
                if held_out:
                    row["rewards"] = {f"first {ATTACK}": 1.5, "second": step - 1.25}
                rows.append(row)
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    return run


def test_samples_of_the_training_are_shown_over_time(tmp_path: Path) -> None:
    runs = [read_run(sampled_run(tmp_path, "a", [1, 10, 20])), read_run(make_run(tmp_path, "b"))]
    steps, prompts = over_time(runs[0])
    assert steps == [1, 10, 20]
    assert [key for key, _ in prompts] == [f"prompt {number} {ATTACK}" for number in (1, 2)]
    assert [row and row["reward"] for row in prompts[1][1]] == [1.25, 10.25, 20.25]
    assert over_time(runs[1]) == ([], [])
    rows = rollout_rows(runs)
    assert {place for place, _, _ in rows} == {0}
    assert [row["step"] for _, row, _ in rows if not row["held_out"]] == [1, 1, 10, 10, 20, 20]
    text = render(runs)
    assert text.count("<h2>Samples while it trained</h2>") == 1
    assert text.count('data-kind="trained" data-reward="20.25"') == 2
    assert text.count("<h3>a: held-out prompts</h3>") == 1
    assert "<h3>b: " not in text
    assert "a answer 2 of 20 " in text
    assert "(20.25: first &lt;script&gt;" in text
    assert "second 18.75)" in text
    tags = Page(text).tags
    assert [attributes for tag, attributes in tags if tag == "script"] == [
        {"type": "application/json", "id": "data"},
        {},
        {},
    ]
    assert all("onerror" not in attributes for _, attributes in tags)


def test_of_many_steps_a_few_are_shown_the_first_and_the_last_among_them(tmp_path: Path) -> None:
    run = read_run(sampled_run(tmp_path, "a", list(range(1, 101))))
    steps, _ = over_time(run)
    assert steps == [1, 20, 40, 60, 80, 100]
    shown = sorted({row["step"] for _, row, _ in rollout_rows([run])})
    assert (shown[0], shown[-1]) == (1, 100)
    assert len(shown) == NUM_ROLLOUTS_SHOWN // 4
    (run_of_long_texts,) = [replace(run, rollouts=[run.rollouts[0] | {"completion": "x" * 9000}])]
    ((_, row, _),) = rollout_rows([run_of_long_texts])
    assert row["completion"] == "x" * MOST_CHARACTERS + " [...]"
    assert "Samples while it trained" not in render([read_run(make_run(tmp_path, "b"))])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": "c"},
        {"step": 1, "prompt": [{"role": "user"}], "completion": "c"},
        {"step": 1, "prompt": "p", "completion": None},
        {"step": "1", "prompt": "p", "completion": "c"},
        {"step": 1, "prompt": [], "completion": "c"},
    ],
)
def test_a_damaged_row_of_samples_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    run = make_run(tmp_path, "a")
    good = {"step": 1, "prompt": [{"role": "user", "content": "p"}], "completion": "c"}
    (run / "samples.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl: object 2: expected step, prompt and"):
        read_run(run)
