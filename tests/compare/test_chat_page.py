"""The page of `fastalign chat`: without JavaScript, what it refuses, and in a real Chromium."""

import html
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests import browser
from tests.browser import opened, ready, said, violations
from tests.compare.site import ATTACK, HOST, Inputs
from tests.compare.talk import ScriptedSpeaker, TalkSite

FIRST_PIECE = "() => /^(We|They)$/.test(document.querySelector('#answers .text')?.textContent)"


class Visitor:
    """A person without JavaScript, who waits until the answers are there."""

    def __init__(self, site: TalkSite, client: TestClient):
        self.client = client
        assert client.get("/", params={"key": site.key}).status_code == 200
        self.page = client.get("/").text

    def post(self, path: str, **data: str) -> Any:
        return self.client.post(path, data=data, headers={"origin": HOST})

    def press(self, path: str, **data: str) -> list[Any]:
        """Send a form; returns what was streamed, if it was not there at once."""
        number = {"number": Inputs(self.page).values.get("number", "")}
        self.page = self.post(path, **number, **data).text
        streamed = ""
        if "data-drawing" in self.page:
            streamed = self.post("/answers").text
            self.page = self.client.get("/").text
        return [json.loads(line) for line in streamed.splitlines()]

    @property
    def said(self) -> str:
        found = re.search(r'<p id="status"[^>]*>(.*?)</p>', self.page)
        assert found
        return html.unescape(found[1])

    @property
    def answers(self) -> list[str]:
        above = self.page.index('id="answers"')
        return re.findall(r'<div class="text">(.*?)</div>', self.page[above:], re.DOTALL)[:-1]


@contextmanager
def visiting(folder: Path, *speakers: Any, **more: Any) -> Iterator[tuple[TalkSite, Visitor]]:
    site = TalkSite(folder, *speakers, **more)
    with TestClient(site.application(7860), base_url=HOST) as client:
        yield site, Visitor(site, client)
    site.talk.close()


def speakers() -> tuple[ScriptedSpeaker, ScriptedSpeaker]:
    return ScriptedSpeaker("ours", ["We", " say"]), ScriptedSpeaker("theirs", ["They", " say"])


def test_two_models_answer_and_the_conversation_goes_on_with_the_better_one(
    tmp_path: Path,
) -> None:
    with visiting(tmp_path, *speakers(), system="Be kind.") as (site, visitor):
        assert "Be kind." in visitor.page
        visitor.press("/say", text="Hi\r\nthere")
        assert visitor.said == "Two answers: which is better?"
        assert sorted(visitor.answers) == ["They say (1)", "We say (1)"]
        assert "ours" not in visitor.page
        a = visitor.answers[0]
        visitor.press("/verdict", verdict="left")
        assert visitor.said == "Saved."
        assert "Answer A: better" in visitor.page
        assert '<p class="model">ours</p>' in visitor.page
        (pair,), (vote,) = site.store.pairs(), site.store.votes()
        better = pair.response_a if vote.verdict == "a" else pair.response_b
        assert better == [{"role": "assistant", "content": a}]
        assert (pair.model_a, pair.model_b) == ("ours", "theirs")
        assert vote.shown_left == vote.verdict
        turns = [{"role": "system", "content": "Be kind."}]
        assert pair.prompt == [*turns, {"role": "user", "content": "Hi\nthere"}]
        visitor.press("/say", text="And?")
        assert site.conversation.turn is not None
        prompt = site.conversation.turn.prompt
        assert [(m.role, m.content) for m in prompt if not isinstance(m, str)][2:] == [
            ("assistant", a),
            ("user", "And?"),
        ]


def test_a_verdict_is_undone_once(tmp_path: Path) -> None:
    with visiting(tmp_path, *speakers()) as (site, visitor):
        visitor.press("/say", text="Hi")
        visitor.press("/verdict", verdict="both_bad")
        vote = Inputs(visitor.page).values["vote"]
        visitor.press("/undo", vote=vote)
        assert (visitor.said, site.store.votes()) == ("Undone.", [])
        visitor.press("/undo", vote=vote)
        assert visitor.said == "There is nothing to undo."
        visitor.press("/verdict", verdict="tie")
        assert [v.verdict for v in site.store.votes()] == ["tie"]


def test_one_model_answers_again_to_compare(tmp_path: Path) -> None:
    with visiting(tmp_path, ScriptedSpeaker("ours", ["We", " say"])) as (site, visitor):
        assert visitor.press("/say", text="Hi") in (
            [[0, ""], [0, "We"], [0, " say"], [0, " (1)"]],
            [],  # it was drawn before it was asked for
        )
        assert visitor.answers == ["We say (1)"]
        assert 'action="/verdict"' not in visitor.page
        visitor.press("/again")
        assert visitor.answers == ["We say (1)", "We say (2)"]
        visitor.press("/verdict", verdict="right")
        assert [p.response_b[0]["content"] for p in site.store.pairs()] == ["We say (2)"]
        assert site.store.votes()[0].verdict == "b"
        visitor.page = visitor.post("/again", number=str(site.conversation.num_answers)).text
        assert visitor.said.startswith("There is no message")
        visitor.press("/new")
        assert "Nothing has been said yet." in visitor.page


def test_a_form_of_an_earlier_answer_is_no_verdict(tmp_path: Path) -> None:
    with visiting(tmp_path, *speakers()) as (site, visitor):
        visitor.press("/say", text="Hi")
        before = visitor.page
        visitor.press("/say", text="Hi again")
        visitor.page = before
        visitor.press("/verdict", verdict="left")
        assert visitor.said == "That was not about the last answer any more."
        visitor.press("/verdict", verdict="best")
        assert visitor.said == "The form is not one of this page."
        assert site.store.votes() == []


def test_a_problem_is_one_line_and_the_message_stays_in_its_box(tmp_path: Path) -> None:
    short = ScriptedSpeaker("ours", ["We"], most=2)
    with visiting(tmp_path, short) as (_, visitor):
        visitor.press("/say", text="Hi")
        visitor.press("/say", text=ATTACK)
        assert visitor.said == "3 messages are all that ours can read: begin a new conversation."
        assert 'class="problem"' in visitor.page
        assert "<script>alert" not in visitor.page
        assert re.search(r"<textarea[^>]*>&lt;script&gt;alert", visitor.page)
        assert visitor.answers == ["We (1)"], "the conversation is as it was"
        visitor.press("/say", text="  ")
        assert len(short.prompts) == 2


def test_a_machine_s_fault_is_said_on_the_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(ScriptedSpeaker):
        def answer(self, *arguments: Any) -> Any:
            raise RuntimeError("out of memory")

    with visiting(tmp_path, Broken("ours", [])) as (_, visitor):
        visitor.press("/say", text="Hi")
        assert visitor.said == "No answer: out of memory"
        assert "an answer could not be drawn" in caplog.text


def test_nothing_changes_while_an_answer_is_drawn_but_by_stop(tmp_path: Path) -> None:
    ours, theirs = speakers()
    ours.goes_on.clear()
    theirs.goes_on.clear()
    with visiting(tmp_path, ours, theirs) as (_, visitor):
        visitor.page = visitor.post("/say", text="Hi").text
        assert visitor.said == "An answer is being drawn."
        assert '<meta http-equiv="refresh" content="2">' in visitor.page
        visitor.post("/say", text="again")
        visitor.post("/new")
        drawn = visitor.press("/stop")
        assert drawn in ([[0, ""], [0, "We"]], [[0, ""], [0, "They"]], [])
        assert visitor.said == "Stopped."
        assert len(visitor.answers) == 1, "the second model was not asked"
        assert len(ours.prompts) + len(theirs.prompts) == 1
        assert "(stopped)" in visitor.page
        assert 'action="/verdict"' not in visitor.page


def test_a_server_that_ends_stops_the_answer(tmp_path: Path) -> None:
    ours = ScriptedSpeaker("ours", ["We", " say"])
    ours.goes_on.clear()
    with visiting(tmp_path, ours) as (site, visitor):
        visitor.post("/say", text="Hi")
        assert site.talk.state.drawing is not None
    assert site.talk.state.drawing is None
    assert site.conversation.turn is not None
    assert site.conversation.turn.stopped == [True]


def test_the_page_keeps_strangers_out(tmp_path: Path) -> None:
    with visiting(tmp_path, *speakers()) as (site, visitor):
        visitor.press("/say", text="Hi")
        stranger = TestClient(site.application(7860), base_url=HOST)
        paths = ("/say", "/again", "/verdict", "/undo", "/new", "/stop", "/answers")
        for path in paths:
            assert stranger.post(path, headers={"origin": HOST}).status_code == 403
            elsewhere = {"origin": "http://elsewhere.example"}
            assert visitor.client.post(path, headers=elsewhere).status_code == 403
        assert stranger.get("/").status_code == 403
        page = visitor.client.get("/")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert visitor.client.get("/", headers={"host": "rebound.example"}).status_code == 400
        assert "Results" in visitor.client.get("/results").text


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.launched() as found:
        yield found


@contextmanager
def talking(folder: Path, *speakers: Any) -> Iterator[tuple[TalkSite, str]]:
    site = TalkSite(folder, *speakers)
    with browser.served(site.application) as origin:
        try:
            yield site, f"{origin}/?key={site.key}"
        finally:
            site.talk.close()


@browser.needs_chromium
def test_answers_are_written_as_they_are_drawn_and_keys_suffice(
    chromium: Any, tmp_path: Path
) -> None:
    ours, theirs = speakers()
    with talking(tmp_path, ours, theirs) as (site, link):
        page = opened(chromium, link)
        ready(page, "#message")
        for speaker in (ours, theirs):
            speaker.goes_on.clear()
        page.keyboard.press("m")
        page.keyboard.type("Hello")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("you")
        page.keyboard.press("Enter")
        # The first piece is on the page while the rest is still to come.
        page.wait_for_function(FIRST_PIECE)
        assert page.get_by_text("Hello\nyou").is_visible()
        page.reload()
        page.wait_for_function(FIRST_PIECE)
        for speaker in (ours, theirs):
            speaker.goes_on.set()
        said(page, "Two answers: which is better?")
        assert page.evaluate("document.activeElement.id") == "main"
        page.keyboard.press("2")
        said(page, "Saved.")
        assert page.evaluate("document.activeElement.id") == "message"
        (vote,) = site.store.votes()
        assert {vote.verdict, vote.shown_left} == {"a", "b"}
        page.keyboard.press("Escape")
        page.keyboard.press("u")
        said(page, "Undone.")
        assert site.store.votes() == []
        # Escape stops.
        ours.goes_on.clear()
        theirs.goes_on.clear()
        page.keyboard.press("m")
        page.keyboard.type("More")
        page.keyboard.press("Enter")
        page.wait_for_function(FIRST_PIECE)
        page.keyboard.press("Escape")
        said(page, "Stopped.")
        assert page.problems == []


@browser.needs_chromium
def test_a_message_that_was_not_sent_stays(chromium: Any, tmp_path: Path) -> None:
    with talking(tmp_path, *speakers()) as (_, link):
        page = opened(chromium, link)
        ready(page, "#message")
        page.get_by_label("Your message").fill("Hello")
        page.context.set_offline(True)
        page.get_by_role("button", name="Send").click()
        said(page, "the server does not answer")
        assert page.get_by_label("Your message").input_value() == "Hello"
        page.context.set_offline(False)
        page.get_by_role("button", name="Send").click()
        said(page, "Two answers")


@browser.needs_chromium
def test_without_javascript_the_forms_are_forms(chromium: Any, tmp_path: Path) -> None:
    with talking(tmp_path, *speakers()) as (site, link):
        page = opened(chromium, link, java_script_enabled=False)
        page.get_by_label("Your message").fill("Hello")
        page.get_by_role("button", name="Send").click()
        page.get_by_role("button", name="B is better").click()
        page.get_by_text("Answer B: better").wait_for()
        assert len(site.store.votes()) == 1


@browser.needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing_and_nothing_overflows(
    chromium: Any, tmp_path: Path, width: int, scheme: str
) -> None:
    long = ["A sentence that goes on for a while, as answers do. " * 12, "x" * 300]
    ours, theirs = ScriptedSpeaker("ours", long), ScriptedSpeaker("theirs", ["Short"])
    with talking(tmp_path, ours, theirs) as (_, link):
        page = opened(
            chromium, link, width, color_scheme=scheme, reduced_motion="reduce", bypass_csp=True
        )
        ready(page, "#message")
        assert violations(page) == ""
        page.get_by_label("Your message").fill("Hello")
        for speaker in (ours, theirs):
            speaker.goes_on.clear()
        page.get_by_role("button", name="Send").click()
        page.wait_for_selector("#answers .answer")
        assert violations(page) == ""
        for speaker in (ours, theirs):
            speaker.goes_on.set()
        said(page, "Two answers")
        assert violations(page) == ""
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_role("button", name="A is better").click()
        said(page, "Saved.")
        page.locator("summary").click()
        assert violations(page) == ""
        assert page.problems == []
