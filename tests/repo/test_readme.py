"""What README and docs promise is run: their Python, their commands' options, tree and links."""

import re
import shlex
from pathlib import Path

import pytest

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS = (Path(__file__).parent / "command_line_options.txt").read_text().splitlines()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
# Pages whose commands are all meant to be typed.
TYPED = ("README.md", "tutorial.md", "training.md", "vllm.md", "data.md", "numbers.md")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str = README) -> list[str]:
    joined = "\n".join(blocks("bash", text)).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("page", ["README.md", "fused.md"])
def test_python_in_the_page_runs(page: str) -> None:
    found = blocks("python", TEXTS[page])
    assert len(found) == 2
    for code in found:
        if "fastalign.trl" in code:
            pytest.importorskip("trl")
        exec(compile(code, page, "exec"), {"__name__": "page"})


def test_the_pages_show_commands() -> None:
    assert len([line for line in commands() if line.startswith("fastalign ")]) == 3
    assert len([line for line in commands(TEXTS["training.md"]) if "fastalign" in line]) >= 6


@pytest.mark.parametrize(
    "line", dict.fromkeys(line for page in TYPED for line in commands(TEXTS[page]))
)
def test_a_command_of_the_pages_has_only_options_that_exist(line: str) -> None:
    words = shlex.split(line.rpartition("&& ")[2], comments=True)
    if words[0].startswith("./scripts/"):
        assert (ROOT / words[0]).is_file()
        return
    if "fastalign" not in words:
        return
    words = words[words.index("fastalign") + 1 :]
    command = words[0]
    assert command in COMMANDS
    pair = " ".join(words[:2])
    prefix = pair if command == "data" or pair in COMMANDS else command
    if command == "estimate":  # it takes the flags of the command that it is asked about
        prefix = words[1]
        assert prefix in ALGORITHMS
    for word in words[1:]:
        if word.startswith("--"):
            assert f"{prefix} {word.split('=')[0]}" in OPTIONS, f"no such option: {line}"


def test_the_tree_of_the_design_page_is_the_tree() -> None:
    tree = next(block for block in blocks("text", TEXTS["design.md"]) if block.startswith("csrc/"))
    named = [line.split()[0] for line in tree.splitlines() if line.strip()]
    assert [name for name in named if not (ROOT / name).exists()] == []
    package = {p.name for p in (ROOT / "fastalign").iterdir() if (p / "__init__.py").is_file()}
    shown = {name.split("/")[1] for name in named if name.startswith("fastalign/")}
    assert package - shown == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
