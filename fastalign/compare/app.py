"""The web application: routes of the page, each a few lines on `Labelling` and `Pages`.

Handlers run one after another in one thread, so no two of them see half of a change.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from fastalign.compare.access import Guard, Keys, read_shown
from fastalign.compare.labelling import Labelling
from fastalign.compare.page import Pages, progress_words
from fastalign.compare.store import Annotator, NewVote, Side, Verdict

STATIC = Path(__file__).parent / "static"
MOST_NOTE = 2000  # characters
OTHER: dict[Side, Side] = {"a": "b", "b": "a"}
SAID = {
    "saved": "Saved. You have compared {count}.",
    "again": "That was saved already. You have compared {count}.",
    "undone": "Undone. This is the pair again.",
    "nothing": "There is nothing to undo.",
}


class Watcher(Protocol):
    """Something that hears of new verdicts, and has numbers for the page."""

    def heard(self) -> None:
        """Take note of a verdict, or of one that was undone."""

    def words(self) -> list[tuple[str, str]]:
        """Return names and numbers for the foot of the page."""


@dataclass(frozen=True)
class Served:
    """Parts of the application.

    Attributes:
        labelling: what is shown to whom.
        pages: the templates.
        keys: who may see the page.
        results: returns the page of results, for the owner alone; it is called on other threads.
        watchers: hear of verdicts.
        clock: seconds since 1970.
    """

    labelling: Labelling
    pages: Pages
    keys: Keys
    results: Callable[[], str]
    watchers: Sequence[Watcher] = ()
    clock: Callable[[], float] = time.time

    def is_owner(self, person: Annotator) -> bool:
        """Return whether a person may see the results."""
        return person.id == self.keys.owner.id


def application(served: Served, hosts: Sequence[str], port: int) -> Starlette:
    """Return the application; requests for other host names than `hosts` are refused.

    The cookie is named by the port, since a browser sends those of a host to all its ports.
    """
    cookie = f"fastalign-compare-{port}"

    def with_person(handler: Callable[[Served, Annotator, Request], Any]) -> Any:
        async def endpoint(request: Request) -> Response:
            person = served.keys.by_cookie(request.cookies.get(cookie))
            if person is None:
                return refused(served, 403, "No key", NO_KEY)
            found: Response = await handler(served, person, request)
            return found

        return endpoint

    async def index(request: Request) -> Response:
        if "key" in request.query_params:
            return enter(served, request, cookie)
        found: Response = await with_person(show_next)(request)
        return found

    return Starlette(
        routes=[
            Route("/", index, methods=["GET"]),
            Route("/vote", with_person(take_vote), methods=["POST"]),
            Route("/undo", with_person(take_undo), methods=["POST"]),
            Route("/results", with_person(show_results), methods=["GET"]),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            Middleware(Guard),
        ],
    )


NO_KEY = (
    "This page opens by the link that the program printed when it started: it ends in ?key= and "
    "your key."
)


def refused(served: Served, status: int, heading: str, text: str) -> Response:
    """Return a page that says why there is no other."""
    page = served.pages.render("refused", heading=heading, text=text)
    return HTMLResponse(page, status_code=status)


def enter(served: Served, request: Request, cookie: str) -> Response:
    """Exchange a key for a cookie.

    The page goes on by itself in place of a redirect: after a link in a message of another site, a
    browser would not send a SameSite=Strict cookie to what a redirect leads to.
    """
    person = served.keys.by_key(request.query_params["key"])
    if person is None:
        return refused(served, 403, "Unknown key", NO_KEY)
    target = "/" if served.keys.compares(person) else "/results"
    response = HTMLResponse(served.pages.render("enter", name=person.name, target=target))
    response.set_cookie(
        cookie,
        served.keys.cookie_of(person),
        max_age=400 * 24 * 3600,
        httponly=True,
        samesite="strict",
    )
    return response


async def show_next(served: Served, person: Annotator, request: Request) -> Response:
    """Show the pair that is on a person's screen, or the next one."""
    if not served.keys.compares(person):
        return RedirectResponse("/results", status_code=303)
    labelling = served.labelling
    progress = labelling.progress(person.id)
    last = labelling.last_vote(person.id)
    said = SAID.get(request.query_params.get("said", ""), "")
    values: dict[str, Any] = {
        "said": said.format(count=progress.mine),
        "owner": served.is_owner(person),
        "last": last and last.id,
        "progress": progress_words(progress),
        "model": [found for watcher in served.watchers for found in watcher.words()],
    }
    form = labelling.shown(person.id)
    if form is None:
        waiting = progress.all_votes < progress.wanted and not labelling.has_seen_all(person.id)
        return HTMLResponse(served.pages.render("done", waiting=waiting, **values))
    assert person.key is not None
    values["signed"] = form.signed(person.key)
    return HTMLResponse(served.pages.compare(labelling.pairs[form.pair], form, **values))


async def fields_of(request: Request) -> dict[str, str]:
    """Return the fields of a form, whose size the guard has limited; of two, the last.

    Raises:
        UnicodeDecodeError: if it is not UTF-8.
    """
    text = (await request.body()).decode()
    found = parse_qs(text, keep_blank_values=True, max_num_fields=20)
    return {name: values[-1] for name, values in found.items()}


async def take_vote(served: Served, person: Annotator, request: Request) -> Response:
    """Store a verdict; a form that is sent twice is one vote."""
    try:
        fields = await fields_of(request)
    except ValueError:
        return refused(served, 400, "Not understood", "The form could not be read.")
    assert person.key is not None
    form = read_shown(fields.get("shown", ""), person.key)
    verdicts: dict[str, Verdict] = {"tie": "tie", "both_bad": "both_bad", "skip": "skip"}
    if form is not None:
        verdicts |= {"left": form.left, "right": OTHER[form.left]}
    verdict = verdicts.get(fields.get("verdict", ""))
    if form is None or verdict is None or not served.keys.compares(person):
        return refused(served, 400, "Not understood", "The form is not one of this page.")
    clearly = fields.get("clearly") == "yes" and verdict in ("a", "b")
    is_new = served.labelling.vote(
        NewVote(
            pair=form.pair,
            annotator=person.id,
            shown_left=form.left,
            verdict=verdict,
            chosen_by=form.chosen_by,
            nonce=form.nonce,
            strength=2 if clearly else 1,
            note=fields.get("note", "").strip()[:MOST_NOTE],
            seconds=max(0.0, served.clock() - form.milliseconds / 1000),
        )
    )
    for watcher in served.watchers:
        watcher.heard()
    return RedirectResponse(f"/?said={'saved' if is_new else 'again'}", status_code=303)


async def take_undo(served: Served, person: Annotator, request: Request) -> Response:
    """Undo a person's last vote, if it is the one that the form names."""
    try:
        fields = await fields_of(request)
        vote = int(fields.get("vote", ""))
    except ValueError:
        return refused(served, 400, "Not understood", "The form could not be read.")
    undone = served.keys.compares(person) and served.labelling.undo(person.id, vote)
    for watcher in served.watchers:
        watcher.heard()
    return RedirectResponse(f"/?said={'undone' if undone else 'nothing'}", status_code=303)


async def show_results(served: Served, person: Annotator, request: Request) -> Response:
    """Show the results to the owner."""
    if not served.is_owner(person):
        return refused(served, 403, "Not for you", "Only who started the program sees the results.")
    return HTMLResponse(await run_in_threadpool(served.results))  # others need not wait for it
