"""A database with a few pairs, and the page on it, for the tests of `compare`."""

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from fastalign.compare.access import Keys
from fastalign.compare.app import Served, VoteWriter, application
from fastalign.compare.labelling import Choice, Labelling
from fastalign.compare.page import Pages
from fastalign.compare.results import results
from fastalign.compare.store import NewPair, NewVote, Store, Verdict

HOST = "http://127.0.0.1:7860"
WITHOUT_REPEATS = Choice(repeat_share=0.0)
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\u202e"


def new_pairs(number: int, *, per_prompt: int = 1) -> list[NewPair]:
    return [
        NewPair(
            f"Question {n // per_prompt}?", f"first {n}", f"the second one {n}", "samples.jsonl"
        )
        for n in range(number)
    ]


def new_store(folder: Path, number: int = 4, *, per_prompt: int = 1) -> Store:
    store = Store(folder / "comparisons.db", create=True)
    store.add_pairs(new_pairs(number, per_prompt=per_prompt))
    return store


def vote_of(
    store: Store, pair: int, person: str, verdict: Verdict, *, left: str = "a", **more: Any
) -> None:
    who = store.annotator(person).id
    more = {"chosen_by": "random", "nonce": f"{pair}/{person}/{left}", "seconds": 2.0, **more}
    assert store.add_vote(NewVote(pair, who, left, verdict, **more))  # type: ignore[arg-type]


class Clock:
    """A clock that goes on by hand."""

    def __init__(self) -> None:
        self.seconds = 1_800_000_000.0

    def __call__(self) -> float:
        return self.seconds


class Site:
    """The page on a database, and a browser of each annotator."""

    def __init__(
        self,
        store: Store,
        names: Sequence[str] = ("me",),
        choice: Choice = WITHOUT_REPEATS,
        **pages: Any,
    ):
        self.store, self.clock = store, Clock()
        people = [store.annotator(name) for name in names]
        self.owner = people[0] if len(people) == 1 else store.annotator("(results)")
        self.labelling = Labelling(store, people, choice, self.clock)
        self.pages = Pages("Which is better?", **pages)
        keys = Keys(people, self.owner)
        self.served = Served(
            labelling=self.labelling,
            writer=VoteWriter(store, self.labelling.take),
            pages=self.pages,
            keys=keys,
            results=lambda: self.pages.results(results(store), self.labelling.pairs),
            clock=self.clock,
        )
        self.app = self.application(7860)
        self.keys = {person.name: str(person.key) for person in (*people, self.owner)}

    def application(self, port: int) -> Any:
        return application(self.served, ["127.0.0.1", "localhost"], port)

    def stranger(self) -> TestClient:
        return TestClient(self.app, base_url=HOST)

    def browser(self, name: str = "me") -> "Browser":
        client = self.stranger()
        page = client.get("/", params={"key": self.keys[name]})
        assert page.status_code == 200, page.text
        return Browser(client)


class Browser:
    """What a person does on the page, without JavaScript."""

    def __init__(self, client: TestClient):
        self.client = client
        self.page = client.get("/").text

    @property
    def fields(self) -> dict[str, str]:
        return Inputs(self.page).values

    @property
    def said(self) -> str:
        found = re.search(r'<p id="status"[^>]*>(.*?)</p>', self.page)
        assert found
        return found[1]

    @property
    def answers(self) -> list[str]:
        return re.findall(r'<div class="text">(.*?)</div>', self.page, re.DOTALL)[-2:]

    def post(self, path: str, data: dict[str, str], **headers: str) -> Any:
        return self.client.post(path, data=data, headers={"origin": HOST, **headers})

    def press(self, verdict: str, **more: str) -> None:
        fields = {"shown": self.fields["shown"], "verdict": verdict, **more}
        reply = self.post("/vote", fields)
        assert reply.status_code == 200, reply.text
        self.page = reply.text

    def undo(self) -> None:
        self.page = self.post("/undo", {"vote": self.fields["vote"]}).text


class Inputs(HTMLParser):
    """The inputs of a page's forms."""

    def __init__(self, page: str):
        super().__init__()
        self.values: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "input" and found.get("name"):
            self.values[str(found["name"])] = found.get("value") or ""
