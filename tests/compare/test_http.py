"""The page as a browser without JavaScript uses it, and what it refuses."""

import re
from pathlib import Path

import pytest

from fastalign.compare.labelling import Choice
from fastalign.compare.store import NewPair, Store
from tests.compare.site import ATTACK, HOST, Site, new_store, vote_of


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(new_store(tmp_path, 4))


def test_a_person_compares_from_link_to_end(site: Site) -> None:
    browser = site.browser()
    pressed = ["left", "right", "tie", "skip"]
    lefts = []
    for number, verdict in enumerate(pressed):
        lefts.append(browser.answers[0])
        browser.press(verdict, note=" because ", clearly="yes")
        assert browser.said == f"Saved. You have compared {min(number + 1, 3)}."
    assert "Nothing is left for you to compare" in browser.page
    votes = site.store.votes()
    for vote, left, verdict in zip(votes, lefts, pressed, strict=True):
        pair = site.labelling.pairs[vote.pair]
        assert left == (pair.response_a if vote.shown_left == "a" else pair.response_b)
        other = "b" if vote.shown_left == "a" else "a"
        expected = {"left": vote.shown_left, "right": other}.get(verdict, verdict)
        assert vote.verdict == expected
        assert vote.note == "because"
        assert vote.strength == (2 if verdict in ("left", "right") else 1)


def test_seconds_are_from_showing_to_verdict(site: Site) -> None:
    browser = site.browser()
    site.clock.seconds += 7.5
    browser.press("left")
    assert site.store.votes()[0].seconds == 7.5


def test_undo_goes_back_one_vote_at_a_time(site: Site) -> None:
    browser = site.browser()
    assert "vote" not in browser.fields
    first = browser.answers
    browser.press("left")
    stale = {"vote": browser.fields["vote"]}
    browser.press("right")
    browser.undo()
    assert browser.said == "Undone. This is the pair again."
    browser.undo()
    assert browser.answers == first
    assert site.store.votes() == []
    assert "There is nothing to undo" in browser.post("/undo", stale).text


def test_a_form_that_is_sent_twice_is_one_vote(site: Site) -> None:
    browser = site.browser()
    fields = {"shown": browser.fields["shown"], "verdict": "left"}
    assert "Saved." in browser.post("/vote", fields).text
    assert "saved already" in browser.post("/vote", fields | {"verdict": "right"}).text
    (vote,) = site.store.votes()
    assert vote.verdict == vote.shown_left


def test_two_people_at_once_have_their_own_pairs_and_votes(tmp_path: Path) -> None:
    site = Site(new_store(tmp_path, 6), ("anna", "ben"), Choice(votes_per_pair=2, repeat_share=0))
    anna, ben = site.browser("anna"), site.browser("ben")
    for _ in range(6):
        anna.press("left")
        ben.press("tie")
    for browser in (anna, ben):
        assert "Thank you" in browser.page
    names = {person.id: person.name for person in site.store.annotators()}
    found = {(names[v.annotator], v.pair) for v in site.store.votes()}
    assert found == {(name, pair) for name in ("anna", "ben") for pair in range(1, 7)}


def test_nothing_is_shown_without_a_key(site: Site) -> None:
    stranger = site.stranger()
    for reply in (
        stranger.get("/"),
        stranger.get("/results"),
        stranger.get("/", params={"key": "wrong"}),
        stranger.post("/vote", data={"verdict": "left"}, headers={"origin": HOST}),
        stranger.post("/undo", data={"vote": "1"}, headers={"origin": HOST}),
    ):
        assert reply.status_code == 403
        assert "Question" not in reply.text
        assert "set-cookie" not in reply.headers


def test_the_key_becomes_a_cookie_that_scripts_and_other_sites_cannot_use(site: Site) -> None:
    reply = site.stranger().get("/", params={"key": site.keys["me"]})
    cookie = reply.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert cookie.startswith("fastalign-compare-7860=")
    assert site.keys["me"] not in cookie
    assert site.keys["me"] not in reply.text
    # No redirect: a browser would not send the cookie to it after a link of another site.
    assert (reply.status_code, len(reply.history)) == (200, 0)
    assert 'content="0; url=/"' in reply.text


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "https://127.0.0.1:7860"},
        {"origin": "http://127.0.0.1:7861"},
        {"origin": ""},
        {"host": "evil.example:7860", "origin": "http://evil.example:7860"},
    ],
)
def test_a_request_of_another_site_changes_nothing(site: Site, headers: dict[str, str]) -> None:
    browser = site.browser()
    fields = {"shown": browser.fields["shown"], "verdict": "left"}
    assert browser.client.post("/vote", data=fields, headers=headers).status_code in (400, 403)
    assert browser.client.post("/vote", data=fields).status_code == 403  # without any Origin
    assert site.store.votes() == []


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:7860", "", "[::1"])
def test_another_host_name_is_refused(site: Site, host: str) -> None:
    reply = site.browser().client.get("/", headers={"host": host})
    assert reply.status_code == 400
    assert "Question" not in reply.text


def test_every_page_has_the_headers(site: Site) -> None:
    client = site.browser().client
    for path, status in (("/", 200), ("/results", 200), ("/static/page.js", 200), ("/no", 404)):
        reply = client.get(path)
        assert reply.status_code == status
        assert reply.headers["content-security-policy"].startswith("default-src 'self'; ")
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-store"
    assert client.post("/vote", data={}).headers["x-frame-options"] == "DENY"  # a refusal, too


def test_large_bodies_are_not_read(site: Site) -> None:
    browser = site.browser()
    fields = {"shown": browser.fields["shown"], "verdict": "left", "note": "x" * 70_000}
    assert browser.post("/vote", fields).status_code == 413
    headers = {"origin": HOST, "content-type": "application/x-www-form-urlencoded"}
    chunks = iter([b"verdict=left"])
    assert browser.client.post("/vote", content=chunks, headers=headers).status_code == 411
    assert site.store.votes() == []


@pytest.mark.parametrize(
    "change",
    [
        {"shown": "1.a.random.0.nonce.0000"},
        {"shown": "ä.b.c"},
        {"shown": ""},
        {"verdict": "undo"},
        {"verdict": "a"},
        {"verdict": ""},
    ],
)
def test_a_form_that_was_changed_is_no_vote(site: Site, change: dict[str, str]) -> None:
    browser = site.browser()
    fields = {"shown": browser.fields["shown"], "verdict": "left"} | change
    assert browser.post("/vote", fields).status_code == 400
    assert site.store.votes() == []


def test_a_form_of_one_person_is_no_vote_of_another(tmp_path: Path) -> None:
    site = Site(new_store(tmp_path), ("anna", "ben"))
    shown = site.browser("anna").fields["shown"]
    reply = site.browser("ben").post("/vote", {"shown": shown, "verdict": "left"})
    assert reply.status_code == 400
    assert site.store.votes() == []


def test_results_are_the_owner_s_alone(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    vote_of(store, 1, "anna", "a")
    vote_of(store, 1, "ben", "b")
    site = Site(store, ("anna", "ben"))
    assert site.browser("anna").client.get("/results").status_code == 403
    owner = site.browser("(results)").client
    page = owner.get("/").text  # who does not compare goes to the results
    assert "For a second look" in page
    assert "anna: a, ben: b" in page
    assert owner.post("/vote", data={}, headers={"origin": HOST}).status_code == 400


def test_texts_of_models_are_texts(tmp_path: Path) -> None:
    store = Store(tmp_path / "c.db", create=True)
    turns = [{"role": "user", "content": ATTACK}]
    sides = [
        [{"role": "assistant", "content": f"{ATTACK}{n}", "tool_calls": [ATTACK]}] for n in "ab"
    ]
    store.add_pairs([NewPair(turns, *sides, "f")])
    vote_of(store, 1, "anna", "a")
    vote_of(store, 1, "ben", "b")
    for markdown in (False, True):
        site = Site(store, ("me",), Choice(votes_per_pair=3), markdown=markdown)
        browser = site.browser()
        for page in (browser.page, browser.client.get("/results").text):
            assert page.count("&lt;script&gt;alert(1)") >= 3
            assert "<img" not in page
            assert "\u202e" not in page
            assert re.findall("<script[^>]*>", page) in (
                [],
                ['<script src="/static/page.js" defer>'],
            )


def test_markdown_makes_structure_and_nothing_that_leads_elsewhere(tmp_path: Path) -> None:
    store = Store(tmp_path / "c.db", create=True)
    text = "**bold** [x](javascript:alert(1)) <http://a.b> ![i](http://a.b/c.png)\n\n|a|b|\n|-|-|\n|1|2|"
    store.add_pairs([NewPair("Why?", text, "plain *text*", "f")])
    page = Site(store, markdown=True).browser().page
    assert "<strong>bold</strong>" in page
    assert "<table>" in page
    assert "<em>text</em>" in page
    assert not re.search(r"<img|<a href=\"(?!#main|/results)", page)
    assert "plain *text*" in Site(store).browser().page


def test_models_are_not_named(tmp_path: Path) -> None:
    store = Store(tmp_path / "c.db", create=True)
    store.add_pairs([NewPair("Why?", "so", "thus", "runs/x and runs/y", "runs/x", "runs/y")])
    assert "runs/" not in Site(store).browser().page


def test_the_page_loads_only_what_the_server_has(site: Site) -> None:
    browser = site.browser()
    loaded = re.findall(r'(?:src|href)="([^"#]+)"', browser.page)
    assert set(loaded) == {"/static/icon.svg", "/static/page.css", "/static/page.js", "/results"}
    for path in loaded:
        assert browser.client.get(path).status_code == 200
    for name in ("page.css", "page.js"):
        assert "//" not in re.sub(
            r"^\s*//.*$", "", browser.client.get(f"/static/{name}").text, flags=re.M
        )
