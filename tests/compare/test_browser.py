"""The page in a real Chromium: by keys alone, small and large, dark and light, with axe-core."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastalign.compare.labelling import Choice
from fastalign.compare.store import NewPair, Store
from tests import browser
from tests.browser import ready, said, violations
from tests.compare.site import Site

pytestmark = browser.needs_chromium
LONG = "A sentence of an answer that goes on for a while, as answers do. " * 12
PROMPT = [
    {"role": "user", "content": "What is a good name for a cat that sleeps all day?"},
    {"role": "assistant", "content": "Does it snore?"},
    {"role": "user", "content": "Only when it rains."},
]


def make_pairs() -> list[NewPair]:
    pairs = [
        NewPair(
            [
                *PROMPT,
                {"role": "assistant", "content": "I see."},
                {"role": "user", "content": f"{n}?"},
            ],
            [{"role": "assistant", "content": f"Number {n}: Pillow. {LONG}"}],
            [{"role": "assistant", "content": f"Number {n}: Thunder.\n\n- loud\n- short"}],
            "samples.jsonl",
        )
        for n in range(12)
    ]
    return pairs


@contextmanager
def serving(folder: Path) -> Iterator[tuple[Site, str]]:
    """The page, and the link to it."""
    store = Store(folder / "comparisons.db", create=True)
    store.add_pairs(make_pairs())
    site = Site(store, ("me",), Choice(repeat_share=0.0))
    with browser.served(site.application) as origin:
        yield site, f"{origin}/?key={site.keys['me']}"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.launched() as found:
        yield found


def opened(chromium: Any, link: str, width: int = 1280, **options: Any) -> Any:
    """A page that has loaded the first pair."""
    page = browser.opened(chromium, link, width, **options)
    ready(page, "#verdict")
    return page


def test_keys_alone_suffice(chromium: Any, tmp_path: Path) -> None:
    with serving(tmp_path) as (site, link):
        page = opened(chromium, link)
        keys = ("ArrowLeft", "2", "0", "x", "s", "Shift+ArrowRight")
        for number, key in enumerate(keys, 1):
            page.keyboard.press(key)
            said(page, f"You have compared {number - (number > 4)}.")
            assert page.evaluate("document.activeElement.id") == "main"
        page.keyboard.press("?")
        assert page.evaluate("document.getElementById('help').open")
        votes = site.store.votes()
        left = [vote.shown_left for vote in votes]
        other = {"a": "b", "b": "a"}
        assert [vote.verdict for vote in votes] == [
            *(left[0], other[left[1]], "tie", "both_bad", "skip", other[left[5]])
        ]
        assert [vote.strength for vote in votes] == [1, 1, 1, 1, 1, 2]
        page.keyboard.press("u")
        said(page, "Undone")
        assert len(site.store.votes()) == 5
        # In the note, keys are letters, and Enter is no verdict.
        page.get_by_label("Why").focus()
        page.keyboard.type("x2 u")
        page.keyboard.press("Enter")
        page.keyboard.press("ArrowLeft")
        said(page, "You have compared 5.")
        assert site.store.votes()[-1].note == "x2 u"
        # Keys can be switched off.
        page.get_by_label("Keys are on").uncheck()
        page.keyboard.press("ArrowLeft")
        page.get_by_role("button", name="A is better").click()
        said(page, "You have compared 6.")
        assert len(site.store.votes()) == 7
        assert page.problems == []


def test_a_vote_that_was_not_saved_is_said_and_can_be_sent_again(
    chromium: Any, tmp_path: Path
) -> None:
    with serving(tmp_path) as (site, link):
        page = opened(chromium, link)
        page.context.set_offline(True)
        page.keyboard.press("1")
        said(page, "Not saved: the server does not answer")
        page.context.set_offline(False)
        page.keyboard.press("1")
        said(page, "You have compared 1.")
        assert len(site.store.votes()) == 1


def test_without_javascript_the_form_is_a_form(chromium: Any, tmp_path: Path) -> None:
    with serving(tmp_path) as (site, link):
        page = opened(chromium, link, java_script_enabled=False)
        page.get_by_label("Clearly better").check()
        page.get_by_role("button", name="B is better").click()
        page.wait_for_url("**/?said=saved")
        assert "You have compared 1." in page.content()
        page.get_by_role("button", name="Undo the last one").click()
        page.wait_for_url("**/?said=undone")
        assert site.store.votes() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_axe_finds_nothing_and_nothing_overflows(
    chromium: Any, tmp_path: Path, width: int, scheme: str
) -> None:
    with serving(tmp_path) as (_, link):
        page = opened(
            chromium, link, width, color_scheme=scheme, reduced_motion="reduce", bypass_csp=True
        )
        page.keyboard.press("1")
        said(page, "You have compared 1.")
        page.keyboard.press("?")
        for path in ("/", "/results"):
            if path != "/":
                page.goto(link.partition("/?")[0] + path)
            assert violations(page) == ""
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.problems == []


def test_answers_stand_side_by_side_on_wide_screens_alone(chromium: Any, tmp_path: Path) -> None:
    with serving(tmp_path) as (_, link):
        page = opened(chromium, link)
        for width, beside in ((1280, True), (701, True), (699, False), (320, False)):
            page.set_viewport_size({"width": width, "height": 900})
            tops = [box.bounding_box()["y"] for box in page.query_selector_all(".answer")]
            assert (tops[0] == tops[1]) == beside
