"""Which pair is shown to whom, and what a verdict changes."""

from collections import Counter
from pathlib import Path
from random import Random
from statistics import median

from fastalign.compare.access import Shown
from fastalign.compare.labelling import LEASE_SECONDS, NUM_BETWEEN, Bag, Choice, Labelling
from fastalign.compare.store import NewPair, NewVote, Store, Verdict
from tests.compare.site import Clock, new_store


def labelling_of(store: Store, *names: str, **choice: float) -> Labelling:
    people = [store.annotator(name) for name in names or ("anna",)]
    return Labelling(store, people, Choice(**{"repeat_share": 0.0, **choice}), Clock())  # type: ignore[arg-type]


def answer(labelling: Labelling, person: int, verdict: Verdict = "a") -> Shown:
    shown = labelling.shown(person)
    assert shown is not None
    vote = NewVote(shown.pair, person, shown.left, verdict, shown.chosen_by, shown.nonce)
    assert labelling.vote(vote)
    return shown


def test_each_pair_is_shown_once_and_sides_are_shuffled(tmp_path: Path) -> None:
    labelling = labelling_of(new_store(tmp_path, 60))
    shown = [answer(labelling, 1) for _ in range(60)]
    assert sorted(s.pair for s in shown) == list(range(1, 61))
    assert [s.pair for s in shown] != sorted(s.pair for s in shown)
    assert 15 < Counter(s.left for s in shown)["a"] < 45
    assert {s.chosen_by for s in shown} == {"random"}
    assert labelling.shown(1) is None
    assert labelling.progress(1).wanted == 60


def test_the_pair_on_the_screen_stays_until_it_has_a_verdict(tmp_path: Path) -> None:
    labelling = labelling_of(new_store(tmp_path, 9))
    assert labelling.shown(1) == labelling.shown(1)


def test_two_people_are_not_asked_the_same(tmp_path: Path) -> None:
    labelling = labelling_of(new_store(tmp_path, 2), "anna", "ben", "cleo")
    first, second = labelling.shown(1), labelling.shown(2)
    assert first
    assert second
    assert first.pair != second.pair
    assert labelling.shown(3) is None
    labelling._clock.seconds += LEASE_SECONDS + 1  # type: ignore[attr-defined]
    assert labelling.shown(3) is not None


def test_each_pair_gets_the_votes_that_are_asked_for(tmp_path: Path) -> None:
    labelling = labelling_of(new_store(tmp_path, 10), "anna", "ben", "cleo", votes_per_pair=2)
    asked: Counter[int] = Counter()
    for number in range(20):
        person = 1 + number % 3
        if labelling.shown(person) is not None:
            asked[answer(labelling, person).pair] += 1
    while any(labelling.shown(person) for person in (1, 2, 3)):
        for person in (1, 2, 3):
            if labelling.shown(person) is not None:
                asked[answer(labelling, person).pair] += 1
    assert asked == Counter(dict.fromkeys(range(1, 11), 2))


def test_pairs_of_several_people_are_finished_early(tmp_path: Path) -> None:
    labelling = labelling_of(new_store(tmp_path, 500), "anna", "ben", votes_per_pair=2)
    for _ in range(30):
        answer(labelling, 1)
    seen = {vote.pair for vote in labelling.votes()}
    both = [answer(labelling, 2).pair in seen for _ in range(20)]
    assert 4 <= sum(both) <= 16  # about half; at random it would be one


def test_a_skipped_pair_goes_to_others(tmp_path: Path) -> None:
    labelling = labelling_of(new_store(tmp_path, 1), "anna", "ben")
    answer(labelling, 1, "skip")
    assert labelling.shown(1) is None
    assert labelling.shown(2) is not None
    assert labelling.votes() == []
    assert labelling.progress(1).mine == 0


def test_equal_answers_are_shown_to_nobody(tmp_path: Path) -> None:
    store = Store(tmp_path / "c.db", create=True)
    store.add_pairs([NewPair("Why?", "so", "so", "f", "m1", "m2")])
    labelling = labelling_of(store)
    assert labelling.shown(1) is None
    assert labelling.progress(1).wanted == 0


def test_undo_shows_the_pair_again_as_it_was(tmp_path: Path) -> None:
    labelling = labelling_of(new_store(tmp_path, 5))
    first, second = answer(labelling, 1), answer(labelling, 1, "skip")
    assert not labelling.undo(1, 1)  # not the last one
    assert labelling.undo(1, 2)
    shown = labelling.shown(1)
    assert shown
    assert (shown.pair, shown.left) == (second.pair, second.left)
    assert shown.nonce != second.nonce
    assert labelling.undo(1, 1)
    shown = labelling.shown(1)
    assert shown
    assert shown.pair == first.pair
    assert not labelling.undo(1, 1)
    assert labelling.progress(1).all_votes == 0
    # The form of the undone vote, sent once more, is no vote.
    assert not labelling.vote(NewVote(first.pair, 1, "a", "b", "random", first.nonce))
    answer(labelling, 1)
    assert len(labelling.votes()) == 1


def test_pairs_come_back_with_the_sides_swapped(tmp_path: Path) -> None:
    store = new_store(tmp_path, 200)
    labelling = labelling_of(store, repeat_share=0.2)
    shown = [answer(labelling, 1) for _ in range(150)]
    first = {s.pair: (place, s) for place, s in enumerate(shown) if s.chosen_by != "repeat"}
    again = [(place, s) for place, s in enumerate(shown) if s.chosen_by == "repeat"]
    assert 12 < len(again) < 50
    for place, repeat in again:
        before, original = first[repeat.pair]
        assert repeat.left != original.left
        assert place - before > NUM_BETWEEN
    assert len({s.pair for _, s in again}) == len(again)
    progress = labelling.progress(1)
    assert progress.mine == progress.all_votes == 150 - len(again)
    assert progress.num_repeated == progress.num_same == len(again)
    restarted = labelling_of(store, repeat_share=0.2)
    assert restarted.progress(1) == progress


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    store = new_store(tmp_path, 6)
    labelling = labelling_of(store)
    pairs = {answer(labelling, 1).pair for _ in range(3)}
    labelling = labelling_of(store)
    later = {answer(labelling, 1).pair for _ in range(3)}
    assert pairs | later == set(range(1, 7))


def test_the_model_chooses_but_for_a_share_that_is_marked(tmp_path: Path) -> None:
    labelling = labelling_of(new_store(tmp_path, 400), random_share=0.25)
    labelling.rank(range(400, 0, -1))
    shown = [answer(labelling, 1) for _ in range(200)]
    by_model = [s.pair for s in shown if s.chosen_by == "model"]
    assert 125 < len(by_model) < 175
    assert by_model == sorted(by_model, reverse=True)
    at_random = [s.pair for s in shown if s.chosen_by == "random"]
    assert min(at_random) < 100


def test_a_second_vote_is_marked_as_the_first_was(tmp_path: Path) -> None:
    labelling = labelling_of(
        new_store(tmp_path, 30), "anna", "ben", votes_per_pair=2, random_share=0.5
    )
    labelling.rank(range(1, 31))
    first = {s.pair: s.chosen_by for s in (answer(labelling, 1) for _ in range(30))}
    assert set(first.values()) == {"model", "random"}
    for _ in range(30):
        shown = answer(labelling, 2)
        assert shown.chosen_by == first[shown.pair]


def test_time_is_that_of_ones_own_verdicts(tmp_path: Path) -> None:
    labelling = labelling_of(new_store(tmp_path, 5))
    for seconds in (6.0, 12.0, 900.0):
        shown = labelling.shown(1)
        assert shown
        labelling.vote(
            NewVote(shown.pair, 1, shown.left, "a", "random", shown.nonce, seconds=seconds)
        )
    assert labelling.progress(1).minutes == 0.2


def test_counts_are_those_of_the_database_whatever_was_voted_and_undone(tmp_path: Path) -> None:
    store = new_store(tmp_path, 40)
    labelling, draw = labelling_of(store, repeat_share=0.3), Random(0)
    verdicts: list[Verdict] = ["a", "b", "tie", "skip"]
    for _ in range(60):
        last = labelling.last_vote(1)
        if last is not None and draw.random() < 0.3:
            assert labelling.undo(1, last.id)
        shown = labelling.shown(1)
        assert shown is not None
        vote = NewVote(
            *(shown.pair, 1, shown.left, draw.choice(verdicts), shown.chosen_by, shown.nonce),
            seconds=draw.choice([0.0, 3.0, draw.uniform(1, 9), draw.uniform(1, 9)]),
        )
        assert labelling.vote(vote)
        again = labelling_of(store, repeat_share=0.3)
        assert labelling.progress(1) == again.progress(1)
        assert labelling.last_vote(1) == again.last_vote(1)
    timed = [v.seconds / 60 for v in labelling.votes() if v.seconds > 0]
    assert labelling.progress(1).minutes == median(timed)
    assert {vote.chosen_by for vote in store.votes()} == {"random", "repeat"}


def test_a_bag_draws_evenly_and_finds_the_only_wanted_pair() -> None:
    bag, draw = Bag(range(10)), Random(0)
    for pair in (9, 3, 0):
        bag.put(pair, inside=False)
        bag.put(pair, inside=False)  # nothing more
    bag.put(12, inside=True)
    assert sorted(bag) == [1, 2, 4, 5, 6, 7, 8, 12]
    assert 9 not in bag
    counts = Counter(bag.draw(draw, lambda pair: pair > 4) for _ in range(5000))
    assert counts.keys() == {5, 6, 7, 8, 12}
    assert all(850 < number < 1150 for number in counts.values())  # 5 standard deviations
    large = Bag(range(5000))
    assert large.draw(draw, lambda pair: pair == 4321) == 4321
    assert large.draw(draw, lambda pair: pair > 5000) is None
