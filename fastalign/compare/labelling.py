"""The state of the labelling: what each annotator is shown next, and what a verdict changes.

Everything is in memory, rebuilt from the database at the start, and changed by one thread; each
verdict is in the database before it counts here.
"""

import random
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fastalign.compare.access import Shown, new_nonce
from fastalign.compare.store import Annotator, ChosenBy, NewVote, Side, Store, Vote

# Verdicts that lie between one and its repetition, so that it is not remembered.
NUM_BETWEEN = 10
# A pair that somebody has on the screen is kept from others for so long.
LEASE_SECONDS = 900.0
RANDOM_TRIES = 20


@dataclass(frozen=True)
class Choice:
    """Settings of what is shown.

    Attributes:
        votes_per_pair: number of people who are asked about a pair.
        repeat_share: share of pairs that come back to the same person, sides swapped.
        random_share: share of pairs drawn at random where a reward model ranks them.
        seed: random seed.
    """

    votes_per_pair: int = 1
    repeat_share: float = 0.05
    random_share: float = 0.2
    seed: int = 0


@dataclass
class Person:
    """State of one annotator.

    Attributes:
        votes: own votes by pair, the first one, in their order; skipped ones among them.
        repeats: second verdicts on a pair, sides swapped.
        num_rows: number of verdicts and undone verdicts; the seed of the next choice.
        current: the pair on the screen.
        num_decided: number of pairs with a verdict.
        seconds: of each of those that was timed, rising.
    """

    votes: dict[int, Vote] = field(default_factory=dict)
    repeats: dict[int, Vote] = field(default_factory=dict)
    num_rows: int = 0
    current: Shown | None = None
    num_decided: int = 0
    seconds: list[float] = field(default_factory=list)

    def last(self) -> Vote | None:
        """Return the last vote that was not undone."""
        ends = (next(reversed(found.values()), None) for found in (self.votes, self.repeats))
        return max((v for v in ends if v is not None), key=lambda vote: vote.id, default=None)

    def add(self, vote: Vote) -> None:
        """Count a vote."""
        if vote.chosen_by == "repeat":
            self.repeats[vote.pair] = vote
            return
        self.votes[vote.pair] = vote
        if vote.decides:
            self.num_decided += 1
            if vote.seconds > 0:
                insort(self.seconds, vote.seconds)

    def remove(self, vote: Vote) -> None:
        """Count a vote no more."""
        if vote.chosen_by == "repeat":
            del self.repeats[vote.pair]
            return
        del self.votes[vote.pair]
        if vote.decides:
            self.num_decided -= 1
            if vote.seconds > 0:
                del self.seconds[bisect_left(self.seconds, vote.seconds)]

    def median_seconds(self) -> float | None:
        """Return the median time of a verdict, or None."""
        middle, number = len(self.seconds) // 2, len(self.seconds)
        if not number:
            return None
        return (self.seconds[middle] + self.seconds[(number - 1) // 2]) / 2


@dataclass(frozen=True)
class Progress:
    """Numbers for one annotator's page.

    Attributes:
        mine: pairs on which this person has a verdict.
        all_votes: verdicts of everybody, repetitions left out.
        wanted: number of verdicts that would complete the work.
        minutes: median minutes of a verdict of this person, or None.
        num_repeated: pairs that this person judged twice.
        num_same: those with the same verdict.
    """

    mine: int
    all_votes: int
    wanted: int
    minutes: float | None
    num_repeated: int
    num_same: int


class Bag:
    """Pairs in no order, of which one is drawn at random without looking at all of them."""

    def __init__(self, pairs: Iterable[int]):
        self._pairs = list(pairs)
        self._place = {pair: place for place, pair in enumerate(self._pairs)}

    def __contains__(self, pair: int) -> bool:
        return pair in self._place

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[int]:
        return iter(self._pairs)

    def put(self, pair: int, *, inside: bool) -> None:
        """Add a pair that is not there, or take one away that is."""
        place = self._place.get(pair)
        if inside and place is None:
            self._place[pair] = len(self._pairs)
            self._pairs.append(pair)
        elif not inside and place is not None:
            last = self._pairs.pop()
            del self._place[pair]
            if last != pair:
                self._pairs[place] = last
                self._place[last] = place

    def draw(self, generator: random.Random, wanted: Callable[[int], bool]) -> int | None:
        """Return a random pair of those that are wanted; None if there is none."""
        for _ in range(min(RANDOM_TRIES, len(self._pairs))):
            pair = generator.choice(self._pairs)
            if wanted(pair):
                return pair
        left = [pair for pair in self._pairs if wanted(pair)]
        return generator.choice(left) if left else None


class Labelling:
    """State of the labelling: who is shown which pair.

    Args:
        store: the database, with its pairs.
        annotators: who compares.
        choice: settings.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        store: Store,
        annotators: Sequence[Annotator],
        choice: Choice,
        clock: Callable[[], float] = time.time,
    ):
        self.store, self._choice, self._clock = store, choice, clock
        self.pairs = {pair.id: pair for pair in store.pairs()}
        self._people = {person.id: Person() for person in annotators}
        self._num_votes = dict.fromkeys(self.pairs, 0)
        self.num_verdicts = 0  # everybody's, repetitions left out
        self._origin: dict[int, ChosenBy] = {}
        self._ranking: list[int] = []
        for vote in store.votes():
            self._count(vote)
        for person in self._people.values():
            person.num_rows = len(person.votes) + len(person.repeats)
        asked = [pair.id for pair in self.pairs.values() if not pair.identical]
        self._open = Bag(i for i in asked if self._num_votes[i] < choice.votes_per_pair)
        self._begun = Bag(i for i in self._open if self._num_votes[i])
        self._num_asked = len(asked)

    def _count(self, vote: Vote) -> None:
        self._people.setdefault(vote.annotator, Person()).add(vote)
        if vote.decides and vote.chosen_by != "repeat":
            self._num_votes[vote.pair] += 1
            self.num_verdicts += 1
            self._origin.setdefault(vote.pair, vote.chosen_by)

    def votes(self) -> list[Vote]:
        """Return everybody's verdicts, without repetitions and skipped pairs."""
        votes = [v for person in self._people.values() for v in person.votes.values() if v.decides]
        return sorted(votes, key=lambda vote: vote.id)

    def rank(self, ranking: Iterable[int]) -> None:
        """Set the order in which pairs are shown, but for those drawn at random."""
        self._ranking = list(ranking)

    def progress(self, annotator: int) -> Progress:
        """Return an annotator's numbers."""
        person = self._people[annotator]
        seconds = person.median_seconds()
        twice = [
            (person.votes[pair].verdict, again.verdict)
            for pair, again in person.repeats.items()
            if again.decides and pair in person.votes
        ]
        return Progress(
            mine=person.num_decided,
            all_votes=self.num_verdicts,
            wanted=self._num_asked * self._choice.votes_per_pair,
            minutes=None if seconds is None else seconds / 60,
            num_repeated=len(twice),
            num_same=sum(first == second for first, second in twice),
        )

    def shown(self, annotator: int) -> Shown | None:
        """Return the pair on an annotator's screen, choosing one if need be; None: no pair left."""
        person = self._people[annotator]
        if person.current is None:
            person.current = self._next(annotator, person)
        elif self._clock() - person.current.milliseconds / 1000 > LEASE_SECONDS:
            # Its time begins anew, since nobody looks at a pair for so long.
            person.current = self._form(
                person.current.pair, person.current.left, person.current.chosen_by
            )
        return person.current

    def has_seen_all(self, annotator: int) -> bool:
        """Return whether no pair that wants votes is new to this annotator."""
        votes = self._people[annotator].votes
        return all(pair in votes for pair in self._open)

    def last_vote(self, annotator: int) -> Vote | None:
        """Return the vote that this annotator may undo."""
        return self._people[annotator].last()

    def vote(self, vote: NewVote) -> bool:
        """Store a verdict, and return whether it is new: a form that is sent twice counts once."""
        return self.is_new(vote) and self.take(self.store.add_vote(vote))

    def is_new(self, vote: NewVote) -> bool:
        """Return whether a verdict is on a pair that its annotator has not judged so."""
        person = self._people[vote.annotator]
        seen = person.repeats if vote.chosen_by == "repeat" else person.votes
        return vote.pair in self.pairs and vote.pair not in seen

    def take(self, vote: Vote | None) -> bool:
        """Count a vote that has been stored; return False if it is None: it was there already."""
        if vote is None:
            return False
        person = self._people[vote.annotator]
        self._count(vote)
        person.num_rows += 1
        self._update(vote.pair)
        if person.current is not None and person.current.pair == vote.pair:
            person.current = None
        return True

    def undo(self, annotator: int, vote: int) -> bool:
        """Undo an annotator's last vote if it is this one, and show its pair again."""
        person = self._people[annotator]
        last = person.last()
        if last is None or last.id != vote:
            return False
        self.store.undo(last)
        person.num_rows += 1
        person.remove(last)
        if last.chosen_by != "repeat":
            if last.decides:
                self._num_votes[last.pair] -= 1
                self.num_verdicts -= 1
                if not self._num_votes[last.pair]:
                    self._origin.pop(last.pair, None)
            self._update(last.pair)
        person.current = self._form(last.pair, last.shown_left, last.chosen_by)
        return True

    def _update(self, pair: int) -> None:
        """Put a pair among the open ones, or take it away, by its number of votes."""
        number = self._num_votes[pair]
        is_open = number < self._choice.votes_per_pair and not self.pairs[pair].identical
        self._begun.put(pair, inside=is_open and number > 0)
        self._open.put(pair, inside=is_open)

    def _form(self, pair: int, left: Side, chosen_by: ChosenBy) -> Shown:
        return Shown(pair, left, chosen_by, int(self._clock() * 1000), new_nonce())

    def _next(self, annotator: int, person: Person) -> Shown | None:
        generator = random.Random(f"{self._choice.seed}/{annotator}/{person.num_rows}")
        if generator.random() < self._choice.repeat_share:
            again = self._repeatable(person)
            if again:
                first = generator.choice(again)
                return self._form(first.pair, "b" if first.shown_left == "a" else "a", "repeat")
        found = self._choose(annotator, person, generator)
        if found is None:
            return None
        pair, chosen_by = found
        left: Side = "a" if generator.random() < 0.5 else "b"
        return self._form(pair, left, self._origin.get(pair, chosen_by))

    def _repeatable(self, person: Person) -> list[Vote]:
        votes = list(person.votes.values())[:-NUM_BETWEEN]
        return [v for v in votes if v.decides and v.pair not in person.repeats]

    def _choose(
        self, annotator: int, person: Person, generator: random.Random
    ) -> tuple[int, ChosenBy] | None:
        """Return a pair that wants votes, has none of this person, and is on no other screen."""
        leased = self._leased(annotator)

        def wanted(pair: int) -> bool:
            needed = self._choice.votes_per_pair - self._num_votes[pair]
            return pair in self._open and pair not in person.votes and leased.count(pair) < needed

        if self._begun and generator.random() < 0.5:  # so that agreement is known early
            begun = self._begun.draw(generator, wanted)
            if begun is not None:
                return begun, "random"
        if self._ranking and generator.random() >= self._choice.random_share:
            ranked = next(filter(wanted, self._ranking), None)
            if ranked is not None:
                return ranked, "model"
        pair = self._open.draw(generator, wanted)
        return None if pair is None else (pair, "random")

    def _leased(self, annotator: int) -> list[int]:
        """Return the pairs on other people's screens."""
        since = (self._clock() - LEASE_SECONDS) * 1000
        shown = [p.current for i, p in self._people.items() if i != annotator and p.current]
        return [s.pair for s in shown if s.milliseconds > since and s.chosen_by != "repeat"]
