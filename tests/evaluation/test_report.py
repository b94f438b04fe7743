"""The page: complete, self-contained, and deaf to what models wrote."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from fastalign.evaluation.report import render, table
from fastalign.evaluation.runs import read_run

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
        ("a", "1.25 ± 0.12", "3.00 ± 0.50", dash, "10"),
        ("b", dash, dash, dash, "10"),
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
