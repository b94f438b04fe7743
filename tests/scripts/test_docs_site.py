"""The documentation's site: it builds without a warning, its links lead somewhere, it asks nobody.

Built once, by the command of scripts/docs.sh.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MISSING = [
    name
    for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml")
    if importlib.util.find_spec(name) is None
]
needs_mkdocs = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'fastalign[docs]'"
)
# Tags whose address a browser fetches by itself.
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Links(HTMLParser):
    """What a page links to, what a browser fetches for it, and the names in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = {name: value or "" for name, value in attrs}
        self.names |= {held[key] for key in ("id", "name") if key in held}
        if tag == "a" and "href" in held:
            self.links.add(held["href"])
        if tag in FETCHED and FETCHED[tag] in held and held.get("rel") not in ("prev", "next"):
            self.fetched.add(held[FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = re.search(r"^python (-m mkdocs .*)$", (ROOT / "scripts/docs.sh").read_text(), re.M)
    assert command
    done = subprocess.run(
        [sys.executable, *command[1].replace('"$folder"', str(folder)).split()],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


def pages(site: Path) -> Iterator[tuple[Path, Links]]:
    for path in sorted(site.rglob("*.html")):
        yield path, Links(path.read_text(encoding="utf-8"))


@pytest.mark.slow
@needs_mkdocs
def test_every_link_leads_somewhere_and_nothing_is_asked_of_others(site: Path) -> None:
    found = dict(pages(site))
    assert len(found) > 50
    broken = []
    for path, page in found.items():
        for address in page.links | page.fetched:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if address in page.fetched and parts.scheme != "data":
                    broken.append(f"{path.name} fetches {address}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            known = found.get(target)
            anchor = unquote(parts.fragment)
            if path.name == "404.html":  # its links begin at the root of a server
                continue
            if not target.is_file() or (known and anchor and anchor not in known.names):
                broken.append(f"{path.relative_to(site)} links to {address}")
    assert broken == []
    for path in [*site.rglob("*.css"), *site.rglob("*.html")]:
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", path.read_text()), path


@pytest.mark.slow
@needs_mkdocs
def test_the_reference_has_every_option_and_every_public_name(site: Path) -> None:
    records = ROOT / "tests/repo"
    lost = []
    texts = {path.stem: path.read_text() for path in (site / "commands").glob("*.html")}
    for line in (records / "command_line_options.txt").read_text().splitlines():
        command, _, option = line.rpartition(" ")
        text = texts[command.removesuffix(" check").replace(" ", "-")]
        plain = re.sub(r"--((?:[\w-]+\.)*)no-", r"--\1", option)
        common = option in ("--help", "--config", "--help-all")
        if not common and option not in text and plain not in text:
            lost.append(line)
    assert lost == []
    for line in (records / "public_names.txt").read_text().splitlines():
        package, _, name = line.partition("(")[0].rpartition(".")
        assert re.search(rf"\b{name}\b", (site / f"api/{package}.html").read_text()), line


@pytest.mark.slow
@needs_mkdocs
def test_formulas_are_mathematics(site: Path) -> None:
    page = (site / "dpo.html").read_text()
    assert page.count("<math ") >= 2
    assert "\\frac" not in page
    equations = (site / "equations.html").read_text()
    assert "<i>π</i>(<i>y</i><sub><i>w</i></sub>)" in equations
    assert not re.search(
        r"\b(y_[wl]|p_t|π_ref|KL_t|m_p|e\^)", re.sub(r"<code>.*?</code>", "", equations)
    )


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def targets(entries: list[dict[str, object]]) -> Iterator[str]:
        for entry in entries:
            for target in entry.values():
                if isinstance(target, list):
                    yield from targets(target)
                else:
                    yield str(target)

    named = {target for target in targets(nav) if not target.endswith("/")}
    made = {"contributing.md", "changelog.md"}
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")} | made
