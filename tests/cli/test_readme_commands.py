"""The commands of the README, the tutorial and the page on training run, in their order."""

import json
import re
import shlex
import shutil
import tomllib
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest

from fastalign.cli.compare import serve
from fastalign.cli.main import main
from fastalign.compare.store import NewVote
from tests.small_runs import WORDS, sentence, write_rows

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": ("runs/dpo/model", "report.html"),
    "docs/tutorial.md": (
        "runs/sft/model",
        "runs/dpo/model",
        "runs/dpo/eval/eval.json",
        "blind.json",
    ),
    "docs/training.md": ("runs/sft/model", "runs/dpo/model", "runs/ipo/model", "samples.jsonl"),
}


def commands(page: str) -> list[list[str]]:
    """What follows `fastalign` in the lines of a page's blocks of shell."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [
        shlex.split(line)[1:]
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        # vLLM takes no model as small as these; tests/cli and tests/trainers have what runs by it.
        if line.startswith("fastalign ") and "vllm" not in line
    ]


def make_files(folder: Path) -> None:
    """What a reader has: a model, pairs, demonstrations, prompts, a reward, and the checkout."""
    pairs = [
        {"prompt": f"The {word}", "chosen": " good", "rejected": " slow and dim"} for word in WORDS
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "more_pairs.jsonl", pairs)
    write_rows(folder / "held_out.jsonl", pairs)
    texts = [{"text": "The" + sentence(n, 5)} for n in range(20)]
    write_rows(folder / "demonstrations.jsonl", texts)
    write_rows(folder / "prompts.jsonl", [{"prompt": f"The {word}"} for word in WORDS])
    (folder / "my_module.py").write_text(
        "def my_reward(prompts, completions):\n    return [len(text) for text in completions]\n"
    )
    shutil.copytree(ROOT / "scripts/recipes", folder / "scripts/recipes")
    (folder / "fastalign").mkdir()
    (folder / "fastalign/samples").symlink_to(ROOT / "fastalign/samples")
    for name, hidden_size in (("my-model", "16"), ("large-model", "32")):
        size = ["--hidden-size", hidden_size, "--layers", "1", "--heads", "2"]
        source = ["--data.train", "demonstrations.jsonl", "--vocab-size", "300", "--out", name]
        assert main(["new-model", *source, *size]) == 0


def prefer_the_left(config: Any, served: Any, listening: Any, hosts: Any) -> None:
    """Judge all pairs, in place of people at a page."""
    labelling = served.labelling
    for person in served.keys.annotators:
        while (shown := labelling.shown(person.id)) is not None:
            place = (shown.pair, person.id, shown.left)
            assert labelling.vote(NewVote(*place, shown.left, shown.chosen_by, shown.nonce))


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_run_one_after_the_other(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(serve, "serve", prefer_the_left)
    monkeypatch.setattr("builtins.input", lambda _: "/quit")
    make_files(tmp_path)
    found = commands(page)
    assert len(found) >= (3 if page == "README.md" else 8)
    for arguments in found:
        assert main(arguments) == 0, arguments
    for name in PAGES[page]:
        assert (tmp_path / name).exists()
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    if page == "README.md":
        return
    assert json.loads((tmp_path / "runs/dpo/eval/eval.json").read_text())["accuracy"] >= 0
    if page == "docs/training.md":
        compared = (tmp_path / "compared.jsonl").read_text().splitlines()
        assert compared
        assert all(json.loads(line)["votes"] for line in compared)


def test_the_readmes_first_line_installs_what_there_is() -> None:
    """The only line that needs the network; tests/scripts has what it runs."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(
        r"^pip install '\.\[(\w+)\]' && python (\S+) my-model$", text, re.MULTILINE
    )
    extra, script = found
    assert (ROOT / script).is_file()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (package,) = (re.match(r"\w+", each) for each in extras["optional-dependencies"][extra])
    assert package is not None
    needed = [re.match(r"\w+", each) for each in requires(package[0]) or []]
    assert "accelerate" in [match[0] for match in needed if match]  # by which the weights are read
