"""The web application: routes of the page, each a few lines on `Labelling` and `Pages`.

Handlers run in one thread, and change nothing while they wait, so none sees half of a change.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
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
from fastalign.compare.store import Annotator, NewVote, Side, Store, Verdict, Vote

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


class VoteWriter:
    """Writes votes to the disk on another thread; those that come meanwhile share the next write.

    Waiting for the disk takes longer than everything else that a verdict costs.

    Args:
        store: the database.
        take: is called with each stored vote, None for one that was there; its result is `add`'s.
    """

    def __init__(self, store: Store, take: Callable[[Vote | None], bool]):
        self._store, self._take = store, take
        self._waiting: list[tuple[NewVote, asyncio.Future[bool]]] = []
        self._task: asyncio.Task[None] | None = None

    async def add(self, vote: NewVote) -> bool:
        """Store a vote; return when it is on the disk and counted."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((vote, done))
        if self._task is None:
            self._task = asyncio.create_task(self._write())
        return bool(await done)

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            votes = [vote for vote, _ in batch]
            try:
                stored = await loop.run_in_executor(None, self._store.add_votes, votes)
                are_new = list(map(self._take, stored))
            except Exception as error:  # such as a full disk: none of them is stored
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
            else:
                for is_new, (_, done) in zip(are_new, batch, strict=True):
                    if not done.done():  # a request may have been given up
                        done.set_result(is_new)
        self._task = None


Handler = Callable[[Any, Annotator, Request], Awaitable[Response]]
"""Answers a request to a site from a person who has a key."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """Base class of a site: pages for people who have a key.

    Attributes:
        pages: the templates.
        keys: who may see the page.
        results: returns the page of results, for the owner alone; it is called on other threads.
    """

    pages: Pages
    keys: Keys
    results: Callable[[], str]

    def is_owner(self, person: Annotator) -> bool:
        """Return whether a person may see the results."""
        return person.id == self.keys.owner.id

    def handlers(self) -> tuple[Handler, Mapping[str, Handler]]:
        """Return what shows the first page, and what takes the forms, by their paths."""
        raise NotImplementedError

    async def stop(self) -> None:
        """End what goes on beside the requests, when the server ends."""


@dataclass(frozen=True, kw_only=True)
class Served(Site):
    """The site on which people compare.

    Attributes:
        labelling: what is shown to whom.
        writer: stores verdicts.
        watchers: hear of verdicts.
        clock: seconds since 1970.
    """

    labelling: Labelling
    writer: VoteWriter
    watchers: Sequence[Watcher] = ()
    clock: Callable[[], float] = time.time

    def handlers(self) -> tuple[Handler, Mapping[str, Handler]]:
        """Return what shows the first page, and what takes the forms, by their paths."""
        return show_next, {"/vote": take_vote, "/undo": take_undo}


def application(site: Site, hosts: Sequence[str], port: int) -> Starlette:
    """Return the application; requests for other host names than `hosts` are refused.

    The cookie is named by the port, since a browser sends those of a host to all its ports.
    """
    cookie = f"fastalign-compare-{port}"
    show_first, forms = site.handlers()

    def with_person(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            person = site.keys.by_cookie(request.cookies.get(cookie))
            if person is None:
                return refused(site, 403, "No key", NO_KEY)
            return await handler(site, person, request)

        return endpoint

    async def index(request: Request) -> Response:
        if "key" in request.query_params:
            return enter(site, request, cookie)
        return await with_person(show_first)(request)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await site.stop()

    return Starlette(
        lifespan=lifespan,
        routes=[
            Route("/", index, methods=["GET"]),
            *(Route(path, with_person(take), methods=["POST"]) for path, take in forms.items()),
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


def refused(site: Site, status: int, heading: str, text: str) -> Response:
    """Return a page that says why there is no other."""
    page = site.pages.render("refused", heading=heading, text=text)
    return HTMLResponse(page, status_code=status)


def enter(site: Site, request: Request, cookie: str) -> Response:
    """Exchange a key for a cookie.

    The page goes on by itself in place of a redirect: after a link in a message of another site, a
    browser would not send a SameSite=Strict cookie to what a redirect leads to.
    """
    person = site.keys.by_key(request.query_params["key"])
    if person is None:
        return refused(site, 403, "Unknown key", NO_KEY)
    target = "/" if site.keys.compares(person) else "/results"
    response = HTMLResponse(site.pages.render("enter", name=person.name, target=target))
    response.set_cookie(
        cookie,
        site.keys.cookie_of(person),
        max_age=400 * 24 * 3600,
        httponly=True,
        samesite="strict",
    )
    return response


async def show_next(served: Served, person: Annotator, request: Request) -> Response:
    """Show the pair that is on a person's screen, or the next one."""
    if not served.keys.compares(person):
        return RedirectResponse("/results", status_code=303)
    return next_page(served, person, request.query_params.get("said", ""))


def next_page(served: Served, person: Annotator, said: str) -> Response:
    """Return the page with the pair that is on a person's screen, or the next one."""
    labelling = served.labelling
    progress = labelling.progress(person.id)
    last = labelling.last_vote(person.id)
    values: dict[str, Any] = {
        "said": SAID.get(said, "").format(count=progress.mine),
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
    vote = NewVote(
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
    is_new = served.labelling.is_new(vote) and await served.writer.add(vote)
    for watcher in served.watchers:
        watcher.heard()
    return go_on(served, person, request, "saved" if is_new else "again")


def go_on(served: Served, person: Annotator, request: Request, said: str) -> Response:
    """Show the next pair: at once to a script, by a redirect to a form, whose page can be reloaded.

    A request spared is a third of what the server has to do for a verdict.
    """
    if request.headers.get("x-requested-with") == "fetch":
        return next_page(served, person, said)
    return RedirectResponse(f"/?said={said}", status_code=303)


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
    return go_on(served, person, request, "undone" if undone else "nothing")


async def show_results(site: Site, person: Annotator, request: Request) -> Response:
    """Show the results to the owner."""
    if not site.is_owner(person):
        return refused(site, 403, "Not for you", "Only who started the program sees the results.")
    return HTMLResponse(await run_in_threadpool(site.results))  # others need not wait for it
