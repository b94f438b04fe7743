"""Models whose answers a test writes, and the page of `fastalign chat` on them."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastalign.compare.access import Keys
from fastalign.compare.app import application
from fastalign.compare.chat_app import Talk
from fastalign.compare.conversation import Conversation, NoRoom, Reply
from fastalign.compare.page import Pages
from fastalign.compare.results import results
from fastalign.compare.store import Store
from fastalign.data.examples import Content


class ScriptedSpeaker:
    """A model whose answers are written down, with a number that counts them.

    Args:
        path: its name.
        pieces: the text of an answer, as it comes.
        most: number of messages that it can read.
    """

    def __init__(self, path: str, pieces: Sequence[str], most: int = 9, *, converses: bool = True):
        self.path, self.converses, self.prompts = path, converses, list[Content]()
        self._pieces, self._most = pieces, most
        self.goes_on = threading.Event()  # without it, an answer waits after its first piece
        self.goes_on.set()

    def answer(
        self,
        prompt: Content,
        seed: int,
        on_text: Callable[[str], None],
        is_stopped: Callable[[], bool],
    ) -> Reply:
        self.prompts.append(prompt)
        if len(prompt) > self._most:
            raise NoRoom(f"{len(prompt)} messages are all that {self.path} can read")
        drawn = ""
        for piece in (*self._pieces, f" ({len(self.prompts)})"):
            if is_stopped():
                return Reply(drawn, True)
            on_text(piece)
            drawn += piece
            while not self.goes_on.wait(0.01):
                if is_stopped():
                    return Reply(drawn, True)
        return Reply(drawn, False)


class TalkSite:
    """The page on a database, with one model or two."""

    def __init__(self, folder: Path, *speakers: Any, system: str | None = None, **pages: Any):
        self.store = Store(folder / "c.db", create=True)
        me = self.store.annotator("me")
        self.conversation = Conversation(speakers, self.store, system, 0)
        shown = Pages("Talk with two models", home="Talk", **pages)
        self.talk = Talk(
            pages=shown,
            keys=Keys([me], me),
            results=lambda: shown.results(results(self.store), {}),
            conversation=self.conversation,
        )
        self.key = str(me.key)

    def application(self, port: int) -> Any:
        return application(self.talk, ["127.0.0.1", "localhost"], port)
