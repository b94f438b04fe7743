"""The page: complete, self-contained, and deaf to what models wrote."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastalign.report import pictures
from fastalign.report.page import over_time, render, table, trained_on
from fastalign.report.runs import read_run, read_runs

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
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags
    assert all("onerror" not in attributes for _, attributes in page.tags)
    links = [
        v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "href")
    ]
    assert all(link is not None and link.startswith("data:") for link in links)
    pictures = [link for link in links if link and link.startswith("data:image/png;base64,")]
    assert len(pictures) == 3  # reward against KL, loss, margins
    for picture in pictures:
        assert base64.b64decode(picture.split(",")[1]).startswith(b"\x89PNG")
    assert "&lt;script&gt;" in text
    assert "1.25 ± 0.12" in text
    assert " second" not in text
    assert "[…]" in text


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
    assert headings == ["Reward against KL", "Training", "Reward models", "PPO", "Settings"]
    drawn = re.findall('alt="(.*?) against the step"', text)
    assert drawn[:4] == [
        "loss",
        "implicit reward margin",
        "accuracy of the scores",
        "margin of the scores",
    ]
    ppo = text[text.index("<h2>PPO</h2>") :]
    assert ppo.count("<img") == 11  # all that are named there but the critic's, which is not logged
    only_ppo = render([read_run(pipeline[3])])
    assert re.findall("<h2>(.*?)</h2>", only_ppo) == ["PPO", "Settings"]


def test_the_reference_s_best_of_n_is_a_curve(
    pipeline: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(pictures, "as_data_uri", lambda figure: figures.append(figure) or "data:,")
    pictures.reward_against_kl([read_run(run) for run in pipeline])
    (axes,) = figures[0].axes
    (best,) = [line for line in axes.lines if "best of 1, 4" in str(line.get_label())]
    assert list(zip(*best.get_data(), strict=True)) == [(0.1, 1.0), (0.4, 4.0)]


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
    assert [step for step, _, _ in trained_on(runs[0])] == [1, 1, 10, 10, 20, 20]
    text = render(runs)
    assert text.count("<h2>Samples while it trained</h2>") == 1
    assert text.count("<h3>a: held-out prompts</h3>") == 1
    assert "<h3>b: " not in text
    assert "a answer 2 of 20 " in text
    assert "(20.25: first &lt;script&gt;" in text
    assert "second 18.75)" in text
    tags = Page(text).tags
    assert "script" not in [tag for tag, _ in tags]
    assert all("onerror" not in attributes for _, attributes in tags)


def test_of_many_steps_a_few_are_shown_the_first_and_the_last_among_them(tmp_path: Path) -> None:
    run = read_run(sampled_run(tmp_path, "a", list(range(1, 101))))
    steps, _ = over_time(run)
    assert steps == [1, 20, 40, 60, 80, 100]
    assert sorted({step for step, _, _ in trained_on(run)}) == steps
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
