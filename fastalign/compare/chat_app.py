"""The page of `fastalign chat`: the conversation, answers as they are drawn, and verdicts on them.

Answers are drawn on one thread. Everything else happens on the server's own, and touches the
conversation only while no answer is being drawn.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse

from fastalign.compare.app import Handler, Site, fields_of, refused
from fastalign.compare.conversation import Conversation, NoRoom
from fastalign.compare.store import Annotator, Verdict
from fastalign.data.conversation import content_as_json
from fastalign.data.examples import Content

VERDICTS: dict[str, Verdict] = {"left": "a", "right": "b", "tie": "tie", "both_bad": "both_bad"}
BUSY = "An answer is being drawn."


class Drawing:
    """Answers that are being drawn; whoever looks at the page gets them from the beginning.

    Args:
        prompt: what is answered.
        texts: the answers that are there already.
        message: the message, which goes back into its box if there is no answer.
    """

    def __init__(self, prompt: Content, texts: list[str], message: str):
        self.prompt, self.texts, self.message = prompt, texts, message
        self.stop = threading.Event()
        self.is_done = False
        self._pieces: list[tuple[int, str]] = []
        self.loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()

    def on_piece(self, place: int, text: str) -> None:
        """Take text of an answer, on the thread that draws it."""
        self.loop.call_soon_threadsafe(self._add, place, text)

    def _add(self, place: int, text: str) -> None:
        self._pieces.append((place, text))
        if place == len(self.texts):
            self.texts.append("")
        self.texts[place] += text
        self._notify()

    def finish(self) -> None:
        """End the streams."""
        self.is_done = True
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield JSON lines `[place, text]`; empty text is the beginning of an answer."""
        sent = 0
        while True:
            fresh, changed = self._pieces[sent:], self._changed
            sent += len(fresh)
            if fresh:
                yield "".join(f"{json.dumps(piece)}\n" for piece in fresh).encode()
            elif self.is_done:
                return
            else:
                await changed.wait()


@dataclass
class State:
    """State of the page besides the conversation.

    Attributes:
        drawing: answers that are being drawn.
        said: a line on what has just happened.
        is_problem: True if that was not what was asked for.
        unsent: text in the box of the next message.
    """

    drawing: Drawing | None = None
    said: str = ""
    is_problem: bool = False
    unsent: str = ""

    def say(self, text: str, *, is_problem: bool = False) -> None:
        """Set the line that the next page shows."""
        self.said, self.is_problem = text, is_problem


@dataclass(frozen=True, kw_only=True)
class Talk(Site):
    """The site on which one person talks with a model or two.

    Attributes:
        conversation: the conversation.
        state: what the page shows besides.
        executor: the thread that draws answers.
    """

    conversation: Conversation
    state: State = field(default_factory=State)
    executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def handlers(self) -> tuple[Handler, Mapping[str, Handler]]:
        """Return what shows the first page, and what takes the forms, by their paths."""
        forms = {
            "/say": while_idle(take_message),
            "/again": while_idle(take_again),
            "/verdict": while_idle(take_verdict),
            "/undo": while_idle(take_undo),
            "/new": while_idle(take_new),
        }
        return show_talk, {**forms, "/answers": stream_answers, "/stop": take_stop}

    def draw(self, drawing: Drawing, ask: Callable[..., None]) -> None:
        """Begin to draw answers on the other thread."""
        before, self.state.drawing = self.conversation.turn, drawing
        future = drawing.loop.run_in_executor(
            self.executor, ask, drawing.on_piece, drawing.stop.is_set
        )
        future.add_done_callback(partial(self._finish, drawing, before))

    def _finish(self, drawing: Drawing, before: Any, future: "asyncio.Future[None]") -> None:
        """Say what has become of it."""
        self.state.drawing = None
        turn, error = self.conversation.turn, future.exception()
        if turn is before and drawing.message:
            self.state.unsent = drawing.message
        if isinstance(error, NoRoom):
            self.state.say(f"{error}: begin a new conversation.", is_problem=True)
        elif error is not None:
            self.state.say(f"No answer: {error}", is_problem=True)
            if not isinstance(error, ValueError):  # a fault of ours or of the machine
                context = {"message": "an answer could not be drawn", "exception": error}
                drawing.loop.call_exception_handler(context)
        elif drawing.stop.is_set():
            self.state.say("Stopped.")
        elif turn is not None and len(turn.answers) > 1 and turn.objection() is None:
            self.state.say("Two answers: which is better?")
        else:
            self.state.say("Answered.")
        drawing.finish()

    async def stop(self) -> None:
        """Stop what is being drawn, and wait until it has stopped."""
        drawing = self.state.drawing
        if drawing is not None:
            drawing.stop.set()
            async for _ in drawing.lines():
                pass

    def close(self) -> None:
        """Wait for the thread that draws; the server has ended."""
        if self.state.drawing is not None:  # not in good order
            self.state.drawing.stop.set()
        self.executor.shutdown()


def home() -> Response:
    """Return a redirect to the page."""
    return RedirectResponse("/", status_code=303)


def while_idle(take: Callable[[Talk, dict[str, str]], None]) -> Handler:
    """Return a handler of a form that is not taken while an answer is being drawn."""

    async def handler(talk: Talk, person: Annotator, request: Request) -> Response:
        try:
            fields = await fields_of(request)
        except ValueError:
            return refused(talk, 400, "Not understood", "The form could not be read.")
        if talk.state.drawing is None:
            try:
                take(talk, fields)
            except ValueError as error:
                talk.state.say(f"{str(error)[0].upper()}{str(error)[1:]}.", is_problem=True)
        return home()

    return handler


async def show_talk(talk: Talk, person: Annotator, request: Request) -> Response:
    """Show the conversation."""
    state, conversation = talk.state, talk.conversation
    values: dict[str, Any] = {"drawing": state.drawing is not None}
    if state.drawing is not None:
        shown, turn, texts = state.drawing.prompt, None, list(state.drawing.texts)
        values |= {"said": BUSY, "problem": False, "unsent": ""}
    else:
        shown, turn = conversation.shown, conversation.turn
        texts = [] if turn is None else turn.answers
        values |= {"said": state.said, "problem": state.is_problem, "unsent": state.unsent}
        state.say("")
        state.unsent = ""
    last = conversation.last_vote()
    return HTMLResponse(
        talk.pages.render(
            "chat",
            prompt=talk.pages.turns(content_as_json(shown)),
            answers=[talk.pages.turns(text) for text in texts if text or turn is not None],
            turn=turn,
            objection=None if turn is None else turn.objection(),
            blind=conversation.is_blind,
            can_ask_again=conversation.can_ask_again,
            number=conversation.num_answers,
            num_votes=conversation.num_votes(),
            last=last and last.id,
            **values,
        )
    )


async def stream_answers(talk: Talk, person: Annotator, request: Request) -> Response:
    """Stream the answers that are being drawn, if there are any."""
    drawing = talk.state.drawing
    if drawing is None:
        return Response(status_code=204)
    return StreamingResponse(drawing.lines(), media_type="application/x-ndjson")


async def take_stop(talk: Talk, person: Annotator, request: Request) -> Response:
    """Stop what is being drawn."""
    if talk.state.drawing is not None:
        talk.state.drawing.stop.set()
    return home()


def take_message(talk: Talk, fields: dict[str, str]) -> None:
    """Begin to answer a message."""
    text = fields.get("text", "").replace("\r\n", "\n").strip()
    if text:
        drawing = Drawing(talk.conversation.prompt_of(text), [], text)
        talk.draw(drawing, partial(talk.conversation.say, text))


def take_again(talk: Talk, fields: dict[str, str]) -> None:
    """Begin to draw a second answer."""
    turn = talk.conversation.turn
    check_number(talk, fields)
    if turn is None or not talk.conversation.can_ask_again:
        raise ValueError("there is no message that a second answer could be given to")
    talk.draw(Drawing(turn.prompt, turn.answers[:1], ""), talk.conversation.again)


def take_verdict(talk: Talk, fields: dict[str, str]) -> None:
    """Store a verdict."""
    check_number(talk, fields)
    if fields.get("verdict") not in VERDICTS:
        raise ValueError("the form is not one of this page")
    talk.conversation.judge(VERDICTS[fields["verdict"]])
    talk.state.say("Saved.")


def take_undo(talk: Talk, fields: dict[str, str]) -> None:
    """Undo the last verdict, if it is the one that the form names."""
    last = talk.conversation.last_vote()
    if last is None or fields.get("vote") != str(last.id):
        raise ValueError("there is nothing to undo")
    talk.conversation.undo()
    talk.state.say("Undone.")


def take_new(talk: Talk, fields: dict[str, str]) -> None:
    """Begin a new conversation."""
    talk.conversation.new()
    talk.state.say("A new conversation.")


def check_number(talk: Talk, fields: dict[str, str]) -> None:
    """Raise ValueError if a form is about an earlier answer, as one of another window may be."""
    if fields.get("number") != str(talk.conversation.num_answers):
        raise ValueError("that was not about the last answer any more")
