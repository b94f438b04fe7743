"""The pages: what a template is given, and answers as text or as Markdown."""

from collections.abc import Mapping
from typing import Any

from fastalign.compare.access import Shown
from fastalign.compare.labelling import Progress
from fastalign.compare.results import (
    PERSON_COLUMNS,
    person_rows,
    summary_rows,
    win_rate_lines,
)
from fastalign.compare.store import Pair
from fastalign.data.conversation import REASONING
from fastalign.evaluation.statistics import wilson_interval
from fastalign.output import visible
from fastalign.page_templates import environment

ROLES = {
    "system": "Instructions",
    "developer": "Instructions",
    "user": "Person",
    "assistant": "Assistant",
    "tool": "Tool",
}


class Pages:
    """Renders the pages.

    Args:
        title: shown at the top.
        markdown: render prompts and answers as Markdown; by default they are shown as they are.
        home: name of the first page, for links to it.
    """

    def __init__(self, title: str, *, markdown: bool = False, home: str = "Compare"):
        # Nothing is masked: people compare what the models wrote, whole.
        self._environment = environment("fastalign.compare", "pages", visible)
        self._environment.globals.update(title=title, home=home)
        self._markdown = markdown_renderer() if markdown else None

    def render(self, template: str, /, **values: Any) -> str:
        """Return a page from the template of this name."""
        page: str = self._environment.get_template(f"{template}.html.jinja").render(**values)
        return page

    def compare(self, pair: Pair, form: Shown, **values: Any) -> str:
        """Return the page that shows a pair; the answer on the left is called A."""
        sides = [pair.response_a, pair.response_b]
        if form.left == "b":
            sides.reverse()
        return self.render(
            "compare",
            prompt=self.turns(pair.prompt),
            sides=[{"name": n, "turns": self.answer(s)} for n, s in zip("AB", sides, strict=True)],
            **values,
        )

    def results(self, found: dict[str, Any], pairs: Mapping[int, Pair]) -> str:
        """Return the page of results."""
        dissenting = []
        for row in found["dissent"]:
            pair = pairs[row["pair"]]
            sides = [("a", self.answer(pair.response_a)), ("b", self.answer(pair.response_b))]
            words = ", ".join(f"{name}: {verdict}" for name, verdict in row["verdicts"].items())
            dissenting.append(({"prompt": self.turns(pair.prompt), "sides": sides}, words))
        return self.render(
            "results",
            win_rates=win_rate_lines(found),
            summary=summary_rows(found),
            columns=PERSON_COLUMNS,
            people=person_rows(found),
            between=found["alpha_between"],
            dissenting=dissenting,
        )

    def answer(self, value: Any) -> list[dict[str, Any]]:
        """Return an answer as turns; the speaker of a single one is known."""
        turns = self.turns(value)
        return [{**turn, "speaker": None} for turn in turns] if len(turns) == 1 else turns

    def turns(self, value: Any) -> list[dict[str, Any]]:
        """Return a text, or a conversation's messages, as turns to show: speaker and body."""
        if isinstance(value, str):
            return [{"speaker": None, "body": self._body(value), "markdown": self._is_rich}]
        turns = []
        for message in value:
            more = {k: v for k, v in message.items() if k not in ("role", "content")}
            body = {"body": self._body(message["content"]), "markdown": self._is_rich}
            turns.append({"speaker": ROLES[message["role"]], **body, "more": others(more)})
        return turns

    @property
    def _is_rich(self) -> bool:
        return self._markdown is not None

    def _body(self, text: str) -> Any:
        """Return what a template writes: the text, which it escapes, or Markdown's HTML."""
        if self._markdown is None:
            return text
        from markupsafe import Markup

        return Markup(self._markdown.render(visible(text)))


def others(keys: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return a message's other keys with names for people."""
    names = {REASONING: "Reasoning", "tool_calls": "Calls", "tools": "Tools"}
    return [(names.get(key, key), value) for key, value in keys.items()]


def markdown_renderer() -> Any:
    """Return a renderer of CommonMark and tables that can make no active content.

    HTML in the text is shown as text. Images would be requests to elsewhere, and links could lead
    people away from a comparison, so neither is made.
    """
    from markdown_it import MarkdownIt

    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    return renderer.disable(["image", "link", "autolink", "html_block", "html_inline"])


def progress_words(progress: Progress) -> dict[str, str]:
    """Return the numbers of a person's page in words."""
    words = {"mine": str(progress.mine), "all": f"{progress.all_votes} of {progress.wanted}"}
    if progress.minutes is not None:
        seconds = progress.minutes * 60
        words["pace"] = f"{seconds:.0f} s" if seconds < 90 else f"{progress.minutes:.1f} min"
    if progress.num_repeated:
        low, high = wilson_interval(
            progress.num_same / progress.num_repeated, progress.num_repeated
        )
        words["agreement"] = (
            f"{progress.num_same} of {progress.num_repeated} ({low:.0%} to {high:.0%})"
        )
    return words
