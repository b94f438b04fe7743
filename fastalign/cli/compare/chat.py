"""`fastalign chat`: talk with a model in the terminal or on a page, and compare its answers."""

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fastalign.cli.answers.sampling import load_sampled
from fastalign.cli.compare import serve
from fastalign.cli.compare.settings import ChatConfig
from fastalign.cli.settings import SampledModel
from fastalign.compare.access import Keys
from fastalign.compare.conversation import Conversation, NoRoom, PieceHandler, Reply
from fastalign.compare.page import Pages
from fastalign.compare.store import Store, Verdict
from fastalign.data.examples import Content, PromptExample
from fastalign.data.tokenise import Encoder
from fastalign.data.tokenizer import eos_token_ids
from fastalign.models.architecture import num_positions
from fastalign.rollouts import SamplingParams, TransformersSampler

HELP = """\
/a /b      this answer is better, and the conversation goes on with it
/same      both are equally good
/bad       both are bad
/again     another answer to the last message, to compare with the first
/which     say which model gave which answer
/undo      take the last verdict back
/new       begin a new conversation
/help      this list
/quit      end (or Ctrl-D); Ctrl-C ends an answer"""
VERDICTS: dict[str, Verdict] = {"/a": "a", "/b": "b", "/same": "tie", "/bad": "both_bad"}


class Stopped(Exception):
    """An answer was stopped."""


class LoadedSpeaker:
    """A model that answers, token by token.

    Args:
        source: the model.
        sampling: how it draws; one answer at a time.
    """

    def __init__(self, source: SampledModel, sampling: SamplingParams):
        self.path = source.path
        self._model, self._tokenizer = load_sampled(source)
        self._encoder = Encoder(self._tokenizer)
        self._sampling = replace(sampling, num_samples=1)
        self._stops = eos_token_ids(self._tokenizer, source.path)

    @property
    def converses(self) -> bool:
        """True if the tokenizer has a chat template; otherwise the model continues plain text."""
        return self._tokenizer.chat_template is not None

    def answer(
        self,
        prompt: Content,
        seed: int,
        on_text: Callable[[str], None],
        is_stopped: Callable[[], bool],
    ) -> Reply:
        """Return the answer to a prompt, passed on as it is drawn; Ctrl-C stops it, too.

        Raises:
            NoRoom: if the prompt leaves no room for an answer.
        """
        ids = self._encoder.prompt(PromptExample(prompt, "the conversation", ""))
        room = (num_positions(self._model.config) or 2**31) - len(ids)
        if room < 1:
            raise NoRoom(f"{len(ids)} tokens are all that {self.path} can read")
        drawn: list[int] = []
        written = 0

        def on_tokens(tokens: Tensor) -> None:
            nonlocal written
            if is_stopped():
                raise Stopped
            drawn.append(int(tokens[0]))
            text = self._text(drawn)
            if len(text) > written and not text.endswith("\ufffd"):  # half a character
                on_text(text[written:])
                written = len(text)

        sampler = TransformersSampler(
            self._model,
            eos_token_ids=self._stops,
            pad_token_id=self._stops[0],
            on_tokens=on_tokens,
        )
        most = min(room, self._sampling.max_new_tokens)
        params = replace(self._sampling, max_new_tokens=most)
        try:
            ((completion,),) = sampler.generate([ids], params, seed=seed)
        except (Stopped, KeyboardInterrupt):
            return Reply(self._text(drawn)[:written], True)
        text = self._text(list(completion.token_ids))
        if len(text) > written:
            on_text(text[written:])
        return Reply(text, False)

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class Terminal:
    """The conversation in the terminal.

    Args:
        conversation: the conversation.
        store: its database.
        write: writes text.
    """

    def __init__(self, conversation: Conversation, store: Store, write: Callable[[str], None]):
        self._conversation, self._store, self._write = conversation, store, write

    def take(self, line: str) -> None:
        """Handle a line: a message, or a word that begins with a slash.

        Raises:
            ValueError: if it cannot be done now; nothing has changed then.
        """
        conversation, text = self._conversation, line.strip()
        if text in VERDICTS:
            self._judge(VERDICTS[text])
        elif text == "/again":
            if not conversation.can_ask_again:
                raise ValueError("/again asks one model for a second answer to the last message")
            self._answered(conversation.again)
        elif text == "/which":
            if conversation.turn is not None:
                names = zip("AB", conversation.turn.models, strict=False)
                self._write("".join(f"{name}: {model}\n" for name, model in names))
        elif text == "/undo":
            conversation.undo()
            self._write("undone\n")
        elif text == "/new":
            conversation.new()
        elif text.startswith("/"):
            self._write(f"{HELP}\n")
        elif text:
            self._answered(partial(conversation.say, text))

    def _answered(self, ask: Callable[[PieceHandler], None]) -> None:
        """Write answers as they come; those that can be compared with their names."""
        begun = False

        def on_piece(place: int, text: str) -> None:
            nonlocal begun
            if text:
                self._write(text)
                return
            if begun:
                self._write("\n")
            begun = True
            if self._conversation.is_blind or place:
                self._write(f"[{'AB'[place]}] ")

        try:
            ask(on_piece)
        except NoRoom as error:
            raise ValueError(f"{error}: /new begins anew") from None
        finally:
            if begun:
                self._write("\n")

    def _judge(self, verdict: Verdict) -> None:
        turn = self._conversation.turn
        if turn is not None and len(turn.answers) == 1 and not self._conversation.is_blind:
            raise ValueError("there are no two answers to compare; /again asks for a second one")
        self._conversation.judge(verdict)
        self._write(f"saved ({self._conversation.num_votes()} votes in {self._store.path})\n")


def write(text: str) -> None:
    """Write text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def lines() -> Iterator[str]:
    """Yield the lines that a person types, until /quit or the end of the input."""
    while True:
        try:
            line = input("> ")
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n")
            return
        if line.strip() in ("/quit", "/exit"):
            return
        yield line


def main(config: ChatConfig) -> int:
    """Run the command until its end; return 0."""
    paths = [config.model.path, *([] if config.beside is None else [config.beside])]
    if len(set(paths)) < len(paths):
        raise ValueError(f"beside: expected another model than {config.beside}, got the same")
    sources: list[Any] = [replace(config.model, path=path) for path in paths]
    with ExitStack() as stack:
        listening = stack.enter_context(serve.opened_socket(config)) if config.page else None
        store = stack.enter_context(closing(Store(config.out, create=True)))
        stack.enter_context(store.only_writer())
        speakers = [LoadedSpeaker(source, config.sampling) for source in sources]
        conversation = Conversation(speakers, store, config.system, config.run.seed)
        if listening is None:
            in_terminal(Terminal(conversation, store, write))
        else:
            on_page(config, conversation, store, listening)
    return 0


def in_terminal(terminal: Terminal) -> None:
    """Talk in the terminal until the input ends."""
    write("/help lists what you can type besides messages\n")
    for line in lines():
        try:
            terminal.take(line)
        except ValueError as error:
            write(f"{error}\n")
        except KeyboardInterrupt:
            write("\n")


def on_page(
    config: ChatConfig, conversation: Conversation, store: Store, listening: socket.socket
) -> None:
    """Serve the page until SIGINT."""
    from fastalign.compare.chat_app import Talk

    me = store.annotator("me")
    title = "two models" if conversation.is_blind else Path(config.model.path).name
    pages = Pages(f"Talk with {title}", markdown=config.markdown, home="Talk")
    results = serve.results_page(config.out, pages)
    talk = Talk(pages=pages, keys=Keys([me], me), results=results, conversation=conversation)
    with closing(talk):
        serve.serve(config, talk, listening, serve.host_names(config))
    print(f"{conversation.num_votes()} votes in {config.out}")
