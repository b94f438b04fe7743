"""A conversation with one model, or with two beside each other, whose answers can be compared.

The terminal and the page of `fastalign chat` are two faces of it.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fastalign.compare.access import new_nonce
from fastalign.compare.pairs import answer_pair
from fastalign.compare.store import NewVote, Store, Verdict, Vote
from fastalign.data.conversation import Message
from fastalign.data.examples import Content

PieceHandler = Callable[[int, str], None]
"""Is called with the place of an answer (0 or 1) and text as it is drawn; first with no text."""


class Reply(NamedTuple):
    """An answer, and whether it was stopped before its end."""

    text: str
    stopped: bool


class NoRoom(ValueError):
    """The conversation is as long as a model can read."""


class Speaker(Protocol):
    """A model that answers."""

    @property
    def path(self) -> str:
        """The model's folder or hub name."""

    @property
    def converses(self) -> bool:
        """True if it takes messages; otherwise it continues plain text."""

    def answer(
        self,
        prompt: Content,
        seed: int,
        on_text: Callable[[str], None],
        is_stopped: Callable[[], bool],
    ) -> Reply:
        """Return an answer, whose text is also passed to `on_text` as it is drawn.

        Raises:
            NoRoom: if the prompt leaves no room for an answer.
        """


@dataclass
class Turn:
    """The answers to the last message.

    Attributes:
        prompt: what was answered.
        answers: one answer, or the two that are called A and B.
        models: the model of each.
        stopped: True for each answer that was stopped before its end.
        verdict: `a` or `b` for the answer that is called so, `tie` or `both_bad`; None: not yet.
    """

    prompt: Content
    answers: list[str]
    models: list[str]
    stopped: list[bool]
    verdict: Verdict | None = None

    def objection(self) -> str | None:
        """Return the reason why there can be no verdict, or None if there can."""
        if len(self.answers) < 2 or self.verdict is not None:
            return "there are no two answers to compare"
        if any(self.stopped):
            return "an answer that was stopped cannot be compared"
        if self.answers[0] == self.answers[1]:
            return "the two answers are the same"
        if not all(answer.strip() for answer in self.answers):
            return "an empty answer cannot be compared"
        return None


def never() -> bool:
    """Return False: nothing stops an answer."""
    return False


class Conversation:
    """A conversation and the verdicts on its answers; used by one thread at a time.

    Args:
        speakers: one model or two; of two, a coin decides in each turn which answer is called A.
        store: the database that verdicts go to.
        system: text of the system message, if the models have a chat template.
        seed: random seed.
        clock: seconds.
    """

    def __init__(
        self,
        speakers: Sequence[Speaker],
        store: Store,
        system: str | None,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._speakers, self._store, self._clock = list(speakers), store, clock
        self._converses = all(speaker.converses for speaker in speakers)
        self._person = store.annotator("me").id
        self._start = () if system is None or not self._converses else (Message("system", system),)
        self._messages: tuple[Message, ...] = self._start
        self.turn: Turn | None = None
        self._random, self._seed, self._num_answers = random.Random(seed), seed, 0
        self._since = clock()

    @property
    def is_blind(self) -> bool:
        """True if two models answer."""
        return len(self._speakers) > 1

    @property
    def shown(self) -> Content:
        """The messages above the answers: the last prompt, or those of the beginning."""
        return self._start if self.turn is None else self.turn.prompt

    @property
    def num_answers(self) -> int:
        """The number of answers that were asked for, which tells an old form from a new one."""
        return self._num_answers

    @property
    def can_ask_again(self) -> bool:
        """True if the only model can draw a second answer to the last message."""
        return self.turn is not None and not self.is_blind and self.turn.verdict is None

    def num_votes(self) -> int:
        """Return the number of votes in the database."""
        return len(self._store.votes())

    def last_vote(self) -> Vote | None:
        """Return the vote that `undo` would undo."""
        mine = [vote for vote in self._store.votes() if vote.annotator == self._person]
        return mine[-1] if mine and mine[-1].chosen_by == "chat" else None

    def prompt_of(self, text: str) -> Content:
        """Return what a message would be answered to: the conversation with it, or it alone."""
        return (*self._with_answer(), Message("user", text)) if self._converses else text

    def new(self) -> None:
        """Begin a new conversation."""
        self._messages, self.turn = self._start, None

    def say(
        self, text: str, on_piece: PieceHandler, is_stopped: Callable[[], bool] = never
    ) -> None:
        """Add a message and its answers; one that gets no answer was not said.

        Raises:
            NoRoom: if a model has no room for an answer.
        """
        before = self._messages, self.turn
        prompt = self.prompt_of(text)
        try:
            self._messages = () if isinstance(prompt, str) else prompt
            order = list(self._speakers)
            self._random.shuffle(order)
            self.turn = Turn(prompt, [], [], [])
            for speaker in order:
                if not any(self.turn.stopped):
                    self._answer(speaker, on_piece, is_stopped)
            if any(self.turn.stopped) and not any(self.turn.answers):
                self._messages, self.turn = before
        except BaseException:
            self._messages, self.turn = before
            raise

    def again(self, on_piece: PieceHandler, is_stopped: Callable[[], bool] = never) -> None:
        """Draw a second answer to the last message, in place of an earlier second one.

        Raises:
            ValueError: if two models answer, or there is nothing to answer.
        """
        if self.turn is None or not self.can_ask_again:
            raise ValueError("there is no message that a second answer could be given to")
        turn = self.turn
        for found in (turn.answers, turn.models, turn.stopped):
            del found[1:]
        self._answer(self._speakers[0], on_piece, is_stopped)

    def _answer(
        self, speaker: Speaker, on_piece: PieceHandler, is_stopped: Callable[[], bool]
    ) -> None:
        turn = self.turn
        assert turn is not None
        place = len(turn.answers)
        on_piece(place, "")
        self._num_answers += 1
        reply = speaker.answer(
            turn.prompt,
            self._seed + self._num_answers,
            lambda text: on_piece(place, text),
            is_stopped,
        )
        turn.answers.append(reply.text)
        turn.models.append(speaker.path)
        turn.stopped.append(reply.stopped)
        self._since = self._clock()

    def _with_answer(self, chosen: int | None = None) -> tuple[Message, ...]:
        """Return the messages and an answer: the chosen one, else that of the first model."""
        turn = self.turn
        if turn is None or not self._converses or self._messages[-1].role == "assistant":
            return self._messages
        if chosen is None:
            first = self._speakers[0].path
            chosen = turn.models.index(first) if first in turn.models else 0
        return (*self._messages, Message("assistant", turn.answers[chosen]))

    def judge(self, verdict: Verdict) -> None:
        """Store a verdict on the two answers, and go on with the better one.

        Args:
            verdict: `a` or `b` for the answer that is called so, `tie` or `both_bad`.

        Raises:
            ValueError: if there are no two answers that can be compared.
        """
        turn = self.turn
        objection = "there are no two answers to compare" if turn is None else turn.objection()
        if turn is None or objection is not None:
            raise ValueError(objection)
        models: tuple[str | None, str | None] = (None, None)
        first = 0  # the place of the pair's first answer, always the first model's
        if self.is_blind:
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
            seconds=self._clock() - self._since,
        )
        if any(v.pair == number and v.annotator == self._person for v in self._store.votes()):
            raise ValueError("these two answers have your verdict already")
        self._store.add_vote(vote)
        turn.verdict = verdict
        self._messages = self._with_answer({"a": 0, "b": 1}.get(verdict))

    def undo(self) -> None:
        """Undo the last verdict.

        Raises:
            ValueError: if there is none.
        """
        last = self.last_vote()
        if last is None:
            raise ValueError("there is nothing to undo")
        self._store.undo(last)
        if self.turn is not None and self.turn.verdict is not None:
            self.turn.verdict = None
            if self._messages[-1:] and self._messages[-1].role == "assistant":
                self._messages = self._messages[:-1]
