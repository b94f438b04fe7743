"""`fastalign chat`: talk with a model in the terminal; answers that are compared become votes."""

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastalign.cli.answers.sampling import load_sampled
from fastalign.cli.compare.settings import ChatConfig
from fastalign.cli.settings import SampledModel
from fastalign.compare.access import new_nonce
from fastalign.compare.pairs import answer_pair
from fastalign.compare.store import NewVote, Store, Verdict
from fastalign.data.conversation import Message
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
/quit      end (or Ctrl-D)"""
VERDICTS: dict[str, Verdict] = {"/a": "a", "/b": "b", "/same": "tie", "/bad": "both_bad"}


class Speaker:
    """A model that answers, token by token.

    Args:
        source: the model.
        sampling: how it draws; one answer at a time.
        write: is called with each piece of text as it is drawn.
    """

    def __init__(
        self, source: SampledModel, sampling: SamplingParams, write: Callable[[str], None]
    ):
        self.path = source.path
        self._model, self._tokenizer = load_sampled(source)
        self._encoder = Encoder(self._tokenizer)
        self._sampling, self._write = replace(sampling, num_samples=1), write
        self._stops = eos_token_ids(self._tokenizer, source.path)

    @property
    def converses(self) -> bool:
        """True if the tokenizer has a chat template; otherwise the model continues plain text."""
        return self._tokenizer.chat_template is not None

    def answer(self, prompt: Content, seed: int) -> str:
        """Return the answer to a prompt, written as it comes.

        Raises:
            ValueError: if the prompt leaves no room for an answer.
        """
        ids = self._encoder.prompt(PromptExample(prompt, "the conversation", ""))
        room = (num_positions(self._model.config) or 2**31) - len(ids)
        if room < 1:
            raise ValueError(
                f"{len(ids)} tokens are all that {self.path} can read: /new begins anew"
            )
        drawn: list[int] = []
        written = 0

        def on_tokens(tokens: Tensor) -> None:
            nonlocal written
            drawn.append(int(tokens[0]))
            text = self._text(drawn)
            if not text.endswith("\ufffd"):  # half a character
                self._write(text[written:])
                written = len(text)

        sampler = TransformersSampler(
            self._model,
            eos_token_ids=self._stops,
            pad_token_id=self._stops[0],
            on_tokens=on_tokens,
        )
        most = min(room, self._sampling.max_new_tokens)
        params = replace(self._sampling, max_new_tokens=most)
        ((completion,),) = sampler.generate([ids], params, seed=seed)
        text = self._text(list(completion.token_ids))
        self._write(text[written:] + "\n")
        return text

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


@dataclass
class Turn:
    """The answers to the last message.

    Attributes:
        prompt: what was answered.
        answers: one answer, or the two that are called A and B.
        models: the model of each.
        compared: True once there is a verdict.
    """

    prompt: Content
    answers: list[str]
    models: list[str]
    compared: bool = False


class Chat:
    """A conversation with one model, or with two beside each other.

    Args:
        speakers: one model or two; of two, a coin decides in each turn which answer is called A.
        store: the database that verdicts go to.
        system: text of the system message, if the models have a chat template.
        write: writes text.
        seed: random seed.
    """

    def __init__(
        self,
        speakers: list[Speaker],
        store: Store,
        system: str | None,
        write: Callable[[str], None],
        seed: int,
    ):
        self._speakers, self._store, self._write = speakers, store, write
        self._converses = all(speaker.converses for speaker in speakers)
        self._person = store.annotator("me").id
        self._start = () if system is None else (Message("system", system),)
        self._messages: tuple[Message, ...] = self._start
        self._turn: Turn | None = None
        self._random, self._seed, self._num_answers = random.Random(seed), seed, 0
        self._since = time.monotonic()

    def take(self, line: str) -> None:
        """Handle a line: a message, or a word that begins with a slash."""
        text = line.strip()
        if text in VERDICTS:
            self._judge(VERDICTS[text])
        elif text == "/again":
            self._again()
        elif text == "/which":
            self._which()
        elif text == "/undo":
            self._undo()
        elif text == "/new":
            self._messages, self._turn = self._start, None
        elif text.startswith("/"):
            self._write(f"{HELP}\n")
        elif text:
            self._say(text)

    def _say(self, text: str) -> None:
        self._go_on()
        before = self._messages
        if self._converses:
            self._messages = (*before, Message("user", text))
        order = list(self._speakers)
        self._random.shuffle(order)
        self._turn = Turn(self._messages if self._converses else text, [], [])
        try:
            for speaker in order:
                self._answer(speaker)
        except BaseException:  # interrupted, or too long: as if it had not been said
            self._messages, self._turn = before, None
            raise

    def _answer(self, speaker: Speaker) -> None:
        assert self._turn is not None
        if len(self._speakers) > 1 or self._turn.answers:
            self._write(f"[{'AB'[len(self._turn.answers)]}] ")
        self._num_answers += 1
        answer = speaker.answer(self._turn.prompt, self._seed + self._num_answers)
        self._turn.answers.append(answer)
        self._turn.models.append(speaker.path)
        self._since = time.monotonic()

    def _go_on(self, chosen: int | None = None) -> None:
        """Add an answer to the conversation: the chosen one, else that of the first model."""
        if self._turn is None or not self._converses or self._messages[-1].role == "assistant":
            return
        if chosen is None:
            chosen = self._turn.models.index(self._speakers[0].path)
        text = self._turn.answers[chosen]
        self._messages = (*self._messages, Message("assistant", text))

    def _again(self) -> None:
        turn = self._turn
        if turn is None or len(self._speakers) > 1 or turn.compared:
            self._write("/again asks one model for a second answer to the last message\n")
            return
        turn.answers, turn.models = turn.answers[:1], turn.models[:1]
        self._answer(self._speakers[0])

    def _which(self) -> None:
        if self._turn is not None:
            names = zip("AB", self._turn.models, strict=False)
            self._write("".join(f"{name}: {model}\n" for name, model in names))

    def _judge(self, verdict: Verdict) -> None:
        turn = self._turn
        if turn is None or len(turn.answers) < 2 or turn.compared:
            self._write("there are no two answers to compare; /again asks for a second one\n")
            return
        if turn.answers[0] == turn.answers[1]:
            self._write("the two answers are the same\n")
            return
        if not all(answer.strip() for answer in turn.answers):
            self._write("an empty answer cannot be compared\n")
            return
        models: tuple[str | None, str | None] = (None, None)
        first = 0  # the place of the pair's first answer, always the first model's
        if len(self._speakers) > 1:
            models = (self._speakers[0].path, self._speakers[1].path)
            first = turn.models.index(self._speakers[0].path)
        answers = turn.answers[first], turn.answers[1 - first]
        pair = answer_pair(turn.prompt, *answers, "chat", models)
        self._store.add_pairs([pair])
        number = self._store.ids_by_digest()[pair.digest]
        stored = next(found for found in self._store.pairs() if found.id == number)
        # The pair may be there in the other order, of an earlier conversation.
        swapped = (first == 1) != (stored.response_a != pair.response_a)
        sides: dict[Verdict, Verdict] = {"a": "b", "b": "a"}
        vote = NewVote(
            number,
            self._person,
            "b" if swapped else "a",
            sides.get(verdict, verdict) if swapped else verdict,
            "chat",
            new_nonce(),
            seconds=time.monotonic() - self._since,
        )
        if any(v.pair == number and v.annotator == self._person for v in self._store.votes()):
            self._write("these two answers have your verdict already\n")
            return
        self._store.add_vote(vote)
        turn.compared = True
        self._go_on({"a": 0, "b": 1}.get(verdict))
        self._write(f"saved ({len(self._store.votes())} votes in {self._store.path})\n")

    def _undo(self) -> None:
        mine = [vote for vote in self._store.votes() if vote.annotator == self._person]
        if not mine or mine[-1].chosen_by != "chat":
            self._write("there is nothing to undo\n")
            return
        self._store.undo(mine[-1])
        if self._turn is not None and self._turn.compared:
            self._turn.compared = False
            if self._messages[-1:] and self._messages[-1].role == "assistant":
                self._messages = self._messages[:-1]
        self._write("undone\n")


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
    store = Store(config.out, create=True)
    with closing(store), store.only_writer():
        speakers = [Speaker(source, config.sampling, write) for source in sources]
        chat = Chat(speakers, store, config.system, write, config.run.seed)
        write("/help lists what you can type besides messages\n")
        for line in lines():
            try:
                chat.take(line)
            except ValueError as error:
                write(f"{error}\n")
            except KeyboardInterrupt:  # ends the answer alone
                write("\n")
    return 0
