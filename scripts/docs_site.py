"""Hooks of the documentation's site: what MkDocs calls while it builds `docs/` (mkdocs.yml).

The pages in `docs/` are also read on a code host, so they stay plain Markdown. The site adds pages
that are made from the code (every command with all its flags, the public Python names, the
examples), and shows formulas as mathematics: without a script, a font or a request to anywhere.
"""

import dataclasses
import importlib
import inspect
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.flags import CONFIG_HELP, EXAMPLES, flags_of
from fastalign.cli.main import MODULES, find

ROOT = Path(__file__).resolve().parents[1]
# Pages of the repository's root that the site has, too.
OF_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# Settings of a command whose help is a text.
SETTINGS_OF_TEXT = {"data": "fastalign.cli.data:CheckConfig"}
# Public packages, as tests/repo/test_public_names.py records them.
PACKAGES = {
    "fastalign": "The drop-in functions, and the functions that train.",
    "fastalign.ops": "Operations on hidden states, logits, pairs and packed responses.",
    "fastalign.losses": "One pure function a formula.",
    "fastalign.trainers": "Settings of training, and the trainers.",
    "fastalign.rewards": "Rewards that can be verified (`fastalign.rewards:NAME`).",
    "fastalign.trl": "TRL's trainers with the fused head.",
}


# Pages from the code


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the navigation: mkdocs.yml names the folders of generated pages alone."""
    pages: dict[str, list[Any]] = {
        "commands/": ["commands/index.md"],
        "api/": ["api/index.md", *({name: f"api/{name}.md"} for name in PACKAGES)],
    }
    pages["commands/"] += [{name: f"commands/{slug(name)}.md"} for name, _ in summaries()]
    for path in examples():
        pages["api/"].append({f"Example: {path.name}": f"examples/{path.stem}.md"})
    for entry in config.nav or []:
        for title, target in entry.items():
            entry[title] = pages.get(target, target) if isinstance(target, str) else target
    return config


def examples() -> list[Path]:
    """Return the notebooks that are kept as scripts."""
    return sorted((ROOT / "examples").glob("*.py"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code and from the repository's root."""
    os.environ["COLUMNS"] = "100"
    for name, page in OF_ROOT.items():
        add(files, config, page, (ROOT / name).read_text(encoding="utf-8"))
    commands = dict(command_pages())
    rows = [f"| [`fastalign {name}`]({slug(name)}.md) | {text} |" for name, text in summaries()]
    table = ["| command | what it does |", "|---|---|", *rows]
    told = f"Made from the code. {CONFIG_HELP} `fastalign COMMAND --help` prints the same."
    add(files, config, "commands/index.md", page_text("Commands", told, *table))
    for name, text in commands.items():
        add(files, config, f"commands/{slug(name)}.md", text)
    rows = [f"| [`{name}`]({name}.md) | {text} |" for name, text in PACKAGES.items()]
    table = ["| package | what it has |", "|---|---|", *rows]
    add(files, config, "api/index.md", page_text("Python", "Made from the code.", "", *table))
    for name, text in api_pages().items():
        add(files, config, f"api/{name}.md", text)
    for path in examples():
        add(files, config, f"examples/{path.stem}.md", example_page(path))
    return files


def add(files: Files, config: MkDocsConfig, path: str, text: str) -> None:
    """Add a page that has no file in `docs/`."""
    files.append(File.generated(config, path, content=text))


def page_text(title: str, *lines: str) -> str:
    """Return a page's Markdown."""
    return "\n".join([f"# {title}", "", *lines, ""])


def slug(command: str) -> str:
    """Return the name of a command's page."""
    return command.replace(" ", "-")


def summaries() -> Iterator[tuple[str, str]]:
    """Yield each command with its line of `fastalign --help`."""
    for name, algorithm in ALGORITHMS.items():
        yield name, algorithm.summary
    for name, command in MODULES.items():
        yield name, command.summary


def command_pages() -> Iterator[tuple[str, str]]:
    """Yield each command with the Markdown of its page."""
    for name, algorithm in ALGORITHMS.items():
        settings = getattr(importlib.import_module("fastalign.trainers"), algorithm.config)
        tables = {setting: algorithm.table(setting) for setting in algorithm.choices}
        yield name, page_text(f"fastalign {name}", *settings_lines(name, settings, tables))
    for name, command in MODULES.items():
        settings = find(SETTINGS_OF_TEXT.get(name, command.settings))
        if isinstance(settings, str):
            lines = ["```text", settings.strip(), "```"]
        else:
            lines = list(settings_lines("data check" if name == "data" else name, settings, {}))
        yield name, page_text(f"fastalign {name}", *lines)


def settings_lines(name: str, settings: Any, tables: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a page on a command whose settings are a dataclass."""
    # As in --help: a blank line parts paragraphs.
    yield from (inspect.getdoc(settings) or "").splitlines()
    places = positional(settings)
    flags = [flag for flag in flags_of(settings) if flag.name not in places]
    required = [flag.name for flag in flags if flag.default is dataclasses.MISSING]
    words = [f"--{each} {EXAMPLES.get(each, 'VALUE')}" for each in required]
    words = [*(f"{place.upper()} ..." for place in places), *words]
    yield from ["", "```bash", " ".join(["fastalign", name, *words]), "```"]
    for place in places:
        text = next(flag.text for flag in flags_of(settings) if flag.name == place)
        yield from ["", f"`{place.upper()}`: {text}"]
    chosen = [flag for flag in flags if any(flag.name.startswith(f"{each}.") for each in tables)]
    sections: dict[str, list[Any]] = {}
    for flag in flags:
        if flag not in chosen:
            sections.setdefault(flag.name.rpartition(".")[0], []).append(flag)
    for section, members in sections.items():
        yield from ["", f"## `--{section}.`" if section else "## Flags", ""]
        yield from table(members)
    for setting, kinds in tables.items():
        yield from ["", f"## `--{setting}`", ""]
        names = ", ".join(f"`{kind}`" for kind in kinds)
        yield f"One of {names}; the default is `{next(iter(kinds))}`."
        for choice, kind in kinds.items():
            first = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
            yield from ["", f"### `--{setting} {choice}`", "", first, ""]
            yield from table(list(flags_of(kind, prefix=f"{setting}.")))


def positional(settings: Any) -> list[str]:
    """Return the arguments that have no flag."""
    hints = get_type_hints(settings, include_extras=True)
    marked = {name for name, hint in hints.items() if "Positional" in repr(hint)}
    return [entry.name for entry in dataclasses.fields(settings) if entry.name in marked]


def table(flags: Sequence[Any]) -> list[str]:
    """Return a Markdown table of flags, or nothing if there are none."""
    if not flags:
        return []
    lines = ["| flag | value | default | what it does |", "|---|---|---|---|"]
    for flag in flags:
        cells = [f"`--{flag.name}`", kind_text(flag.kind), default_text(flag.default), flag.text]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def kind_text(kind: Any) -> str:
    """Return a flag's type in words."""
    if kind is bool:
        return "on or off"
    if get_origin(kind) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(kind))
    members = [each for each in get_args(kind) if each not in (type(None), Ellipsis)]
    if get_origin(kind) is tuple and members:
        return f"{kind_text(members[0])} ..."
    if members:
        return " or ".join(dict.fromkeys(kind_text(each) for each in members))
    words = {str: "text", int: "whole number", float: "number", Path: "path"}
    return words.get(kind, str(getattr(kind, "__name__", kind)))


def default_text(default: Any) -> str:
    """Return a flag's default as it would be typed."""
    if default is dataclasses.MISSING:
        return "**required**"
    if default is None or default in ("", ()):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{' '.join(map(str, default)) if isinstance(default, tuple) else default}`"


def api_pages() -> dict[str, str]:
    """Return the Markdown of each public package; what several export stands in one of them."""
    written: set[str] = set()
    pages = {}
    for name in sorted(PACKAGES, reverse=True):  # `fastalign`, which passes names on, is the last
        module = importlib.import_module(name)
        lines = [PACKAGES[name]]
        if not hasattr(module, "__path__") or name == "fastalign.trl":  # they may need an extra
            pages[name] = page_text(name, *lines, "", f"::: {name}")
            continue
        homes = {each: home_of(module, each) for each in sorted(module.__all__)}
        elsewhere = [each for each, home in homes.items() if home in written]
        if elsewhere:
            links = (f"[`{each}`][{homes[each]}]" for each in elsewhere)
            lines += ["", f"Also here: {', '.join(links)}."]
        for home in homes.values():
            if home not in written:
                lines += ["", f"::: {home}"]
        written.update(homes.values())
        pages[name] = page_text(name, *lines)
    return pages


def home_of(module: Any, name: str) -> str:
    """Return the dotted path of the definition of a package's name."""
    value = getattr(module, name)
    home = getattr(value, "__module__", "") if callable(value) else ""
    return f"{home if home.startswith('fastalign') else module.__name__}.{name}"


def example_page(path: Path) -> str:
    """Return a page of a notebook that is kept as a script: its text, and its code."""
    lines = []
    for cell in re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
        if cell.startswith(" [markdown]"):
            body = cell.partition("\n")[2]
            lines += [re.sub(r"^# ?", "", line) for line in body.splitlines()]
        elif cell.strip():
            lines += ["```python", *cell.strip().splitlines(), "```", ""]
    if not any(line.startswith("# ") for line in lines[:3]):
        lines = [f"# {path.name}", "", *lines]
    return "\n".join([*lines, ""])


# Links


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave `docs/` at the site's pages; elsewhere, leave their text alone."""
    here = page.file.src_uri
    from_root = here in OF_ROOT.values()
    depth = here.count("/")

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = os.path.normpath(
            target if from_root else os.path.join("docs", os.path.dirname(here), target)
        )
        site = site_path(path)
        if site is None:
            return text
        return f"[{text}]({'../' * depth}{site}{anchor or ''})"

    markdown = re.sub(r"(?<!!)\[([^\]\[]+)\]\(([^)#\s]+)(#[^)\s]*)?\)", link, markdown)
    return re.sub(r"^```mermaid\n(.*?)^```\n", layers, markdown, flags=re.MULTILINE | re.DOTALL)


def site_path(path: str) -> str | None:
    """Return the site's page of a file of the repository, None if it has none."""
    if path in OF_ROOT:
        return OF_ROOT[path]
    if path == "README.md":
        return "index.md"
    if re.fullmatch(r"examples/\w+\.py", path):
        return path.replace(".py", ".md")
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def layers(match: re.Match[str]) -> str:
    """Return a chart of layers as boxes, one below the other; no script draws it."""
    boxes = re.findall(r'\w+\["(.*?)"\]', match[1])
    if not boxes:
        raise ValueError(f"a chart without boxes: {match[0]}")
    items = "".join(f"<li>{box.replace('<br/>', '<br>')}</li>" for box in boxes)
    return f'<ol class="layers">{items}</ol>\n'


# Scripts

# A section of the navigation whose label is a link has no name.
_SECTION = re.compile(
    r'(<nav class="md-nav" data-md-level="\d" )aria-labelledby="(\w+)"'
    r'([^>]*>\s*<label class="md-nav__title"[^>]*>\s*<span[^>]*></span>\s*(.*?)\s*</label>)'
)
SHIM = "https://unpkg.com/iframe-worker/shim"  # lets the search run in pages of a disk


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Take the search's script for pages without a server from the site itself; name its parts."""
    output = output.replace(SHIM, get_relative_url("javascripts/iframe-worker.js", page.url))
    # A screen reader announces each region by a name of its own; the theme repeats some.
    output = output.replace('role="dialog">', 'role="dialog" aria-label="Search">')
    return _SECTION.sub(r'\1aria-label="\4"\3', output)


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    """Do the same in the page for addresses that do not exist."""
    return output_content.replace(SHIM, "/javascripts/iframe-worker.js")


# Formulas


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show LaTeX as MathML, and the one-line formulas of the tables as mathematics."""
    html = re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', mathml, html, flags=re.DOTALL)
    if page.file.src_uri in ("equations.md", "losses.md"):
        html = re.sub(
            r"<(td|p)>(.*?)</\1>",
            lambda found: f"<{found[1]}>{typeset(found[2])}</{found[1]}>",
            html,
            flags=re.DOTALL,
        )
    return html


def mathml(match: re.Match[str]) -> str:
    """Return MathML of the LaTeX that Markdown marked."""
    latex = re.sub(r"^\\[(\[]|\\[)\]]$", "", match[2].strip())
    for entity, sign in (("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        latex = latex.replace(entity, sign)
    if match[1] == "span":
        return convert(latex.strip(), display="inline")
    shown = convert(latex.strip(), display="block")
    return f'<div class="formula" tabindex="0">{shown}</div>'  # a wide one scrolls by keyboard, too


GREEK = "\u03b1-\u03c9\u0391-\u03a9"
LETTER = f"[A-Za-z{GREEK}\u2113]"
MINUS = "\u2212"
UPRIGHT = "\u03a3\u03c3"  # a sum, and the logistic function
_SCRIPT = re.compile(
    # one letter, or a word that has something below it
    rf"(?<![A-Za-z{GREEK}_.'-])(?P<base>{LETTER}|[A-Za-z-]+(?=_)|(?<=[)\]])(?=_))(?P<prime>'?)"
    rf"(?P<sub>_(?:\([^()]*\)|[A-Za-z0-9{GREEK}]+))?"
    rf"(?P<sup>\^(?:\([^()]*\)|{MINUS}?[A-Za-z0-9{GREEK}]+(?:_[A-Za-z])?))?(?![A-Za-z-])"
)


def typeset(cell: str) -> str:
    """Return a cell or a paragraph with subscripts, superscripts and variables in italics.

    Code, links and names of several letters stay as they are: only one letter is a variable.
    """
    parts = re.split(r"(<code>.*?</code>|<a .*?</a>|<[^>]+>)", cell)
    for number in range(0, len(parts), 2):
        parts[number] = _SCRIPT.sub(scripted, parts[number])
    return "".join(parts)


def scripted(match: re.Match[str]) -> str:
    """Return one variable with what stands below and above it."""
    base, below, above = match["base"], match["sub"], match["sup"]
    if base in ("a", "A", "I") and not (below or above or match["prime"]):  # an article, a pronoun
        return match[0]
    shown = base if len(base) != 1 or base in UPRIGHT else f"<i>{base}</i>"
    shown += match["prime"]
    if below:
        shown += f"<sub>{typeset(below[1:].strip('()'))}</sub>"
    if above:
        shown += f"<sup>{typeset(above[1:].strip('()'))}</sup>"
    return shown
