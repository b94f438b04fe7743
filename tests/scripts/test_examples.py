"""The examples run, and so does the Python of docs/python.md; one of them as a notebook."""

import base64
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import fill

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "small_model")
NOTEBOOK = "dpo_from_objects"  # which the last test runs in a kernel


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples write to the current folder, and import their model from their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def test_there_are_five_examples_and_the_page_lists_them() -> None:
    page = (ROOT / "docs/python.md").read_text()
    assert len(EXAMPLES) == 5
    for path in EXAMPLES:
        assert f"(../examples/{path.name})" in page
        assert path.read_text().startswith("# %% [markdown]\n# # ")


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.stem != NOTEBOOK], ids=lambda path: path.stem
)
def test_an_example_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    if path.stem == "fused_loss":
        assert names["losses"][-1] < names["losses"][0]
        return
    metrics = (names["run"].result if "run" in names else names["result"]).metrics
    measure = {"ppo_own_reward": "reward", "reward_with_ties": "accuracy"}.get(path.stem, "loss")
    first, last = (sum(row[measure] for row in part) for part in (metrics[:3], metrics[-3:]))
    assert (last < first) if measure == "loss" else (last > first)
    assert "held-out" in printed or path.stem == "ppo_own_reward"


def test_python_of_the_page_runs() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fill(Path.cwd())
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    names: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(folder / "llama"),
        "tokenizer": AutoTokenizer.from_pretrained(folder / "llama"),
        "rows": rows,
    }
    page = (ROOT / "docs/python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "<page>", "exec"), names)
    assert names["run"].result.finished


def cells_of(path: Path) -> list[tuple[str, str]]:
    """The cells of a script in percent format: `code` or `markdown`, and the text."""
    cells = []
    for part in re.split(r"^# %%", path.read_text(), flags=re.MULTILINE)[1:]:
        head, _, text = part.partition("\n")
        if "[markdown]" in head:
            cells.append(("markdown", re.sub(r"^# ?", "", text, flags=re.MULTILINE)))
        else:
            cells.append(("code", text.strip()))
    return cells


def test_a_notebook_trains_plots_and_samples() -> None:
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    pytest.importorskip("ipykernel")
    made = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    cells = [made[kind](text) for kind, text in cells_of(ROOT / f"examples/{NOTEBOOK}.py")]
    path = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'examples')]!r}"
    plots = "%matplotlib inline"
    notebook = nbformat.v4.new_notebook(cells=[made["code"](f"{path}\n{plots}"), *cells])
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute()
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    shown = [output.data for output in outputs if "data" in output]
    (bar,) = [data["text/plain"] for data in shown if "dpo" in data["text/plain"]]
    assert "12/12" in bar  # one line, which was updated
    assert "loss" in bar
    (plot,) = [data["image/png"] for data in shown if "image/png" in data]
    assert base64.b64decode(plot).startswith(b"\x89PNG")
    assert "optim" not in text
    assert "12/12" not in text  # in place of the bar there are no lines
    assert len(text.splitlines()) < 15
    assert text.splitlines()[-1].startswith("The battery")
    assert json.loads(Path("runs/dpo-1/metrics.jsonl").read_text().splitlines()[-1])["step"] == 12
