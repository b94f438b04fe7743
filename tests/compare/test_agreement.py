"""Agreement, biases and win rates of votes, against numbers worked out by hand."""

import math
from pathlib import Path

import pytest

from fastalign.compare.agreement import alpha_of, dissent, nominal_alpha, outcome_counts
from fastalign.compare.export import votes_by_pair
from fastalign.compare.results import results
from fastalign.compare.store import NewPair, Store
from fastalign.evaluation.statistics import wilson_interval
from tests.compare.site import new_store, vote_of

LETTERS = {"a": "a", "b": "b", "t": "tie", "x": "both_bad", "s": "skip"}


def store_of(folder: Path, **people: str) -> Store:
    """A database in which each person gives the n-th letter's verdict to the n-th pair."""
    store = new_store(folder, max(map(len, people.values())))
    for name, letters in people.items():
        for pair, letter in enumerate(letters, 1):
            if letter != ".":
                vote_of(store, pair, name, LETTERS[letter])  # type: ignore[arg-type]
    return store


def test_alpha_by_hand(tmp_path: Path) -> None:
    # Ten pairs, one disagreement. With a and b exchanged beside them: 40 values, 2 of them ties.
    store = store_of(tmp_path, anna="aaaaabbbbt", ben="aaaaabbbbb")
    counts = outcome_counts(votes_by_pair(store.votes()))
    observed = 4 / 40  # ordered pairs of differing values within pairs, over all values
    num_a, num_b, num_tie = 19, 19, 2
    expected = 2 * (num_a * num_b + num_a * num_tie + num_b * num_tie) / (40 * 39)
    assert nominal_alpha(counts) == pytest.approx(1 - observed / expected)
    found = alpha_of(votes_by_pair(store.votes()))
    assert found["alpha_count"] == 10
    assert found["alpha_low"] < found["alpha"] < found["alpha_high"] <= 1


def test_alpha_does_not_depend_on_which_answer_was_written_first(tmp_path: Path) -> None:
    counts = outcome_counts(votes_by_pair(store_of(tmp_path, x="aaaabt", y="aaabbt").votes()))
    swapped = counts.copy()
    swapped[:2] = counts[:2][:, [1, 0, 2]]
    assert nominal_alpha(swapped) == nominal_alpha(counts)


def test_without_two_votes_on_a_pair_there_is_no_alpha(tmp_path: Path) -> None:
    store = store_of(tmp_path, anna="aab", ben="s")
    assert alpha_of(votes_by_pair(store.votes())) == {
        **{"alpha": None, "alpha_low": None, "alpha_high": None},
        "alpha_count": 0,
    }
    assert math.isnan(nominal_alpha(outcome_counts({1: []})))


def test_dissent_is_the_votes_entropy(tmp_path: Path) -> None:
    store = store_of(tmp_path, anna="aatx", ben="abtt", cleo="ab", dora="ab")
    by_pair = votes_by_pair(store.votes())
    assert dissent(by_pair[1]) == 0
    assert dissent(by_pair[2]) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert dissent(by_pair[4]) == 0  # two bad answers are equally good
    assert [row["pair"] for row in results(store)["dissent"]] == [2]


def test_biases_of_each_person(tmp_path: Path) -> None:
    store = new_store(tmp_path, 10)  # b is the longer answer
    for pair in range(1, 11):
        verdict = "b" if pair <= 8 else "a"
        vote_of(store, pair, "anna", verdict, left="b" if pair <= 6 else "a")  # type: ignore[arg-type]
    vote_of(store, 1, "anna", "b", left="a", chosen_by="repeat")
    vote_of(store, 2, "anna", "a", left="a", chosen_by="repeat")
    vote_of(store, 1, "ben", "tie")
    vote_of(store, 3, "file", "a", chosen_by="import")
    anna, ben, file = results(store)["annotators"]
    assert (anna["longer"], anna["longer_count"]) == (8 / 10, 10)
    assert (anna["longer_low"], anna["longer_high"]) == wilson_interval(0.8, 10)
    assert (anna["left"], anna["left_count"]) == (8 / 10, 10)  # six b and two a
    assert (anna["same_again"], anna["same_again_count"]) == (1 / 2, 2)
    assert (anna["with_others"], anna["with_others_count"]) == (0.0, 2)
    assert anna["num_votes"] == 10
    assert anna["median_seconds"] == 2.0
    assert (ben["ties"], ben["left"], ben["left_count"]) == (1.0, None, 0)
    assert file["left_count"] == 0  # nobody knows what stood on the left


def test_the_human_win_rate_counts_ties_as_halves_and_equal_answers_as_ties(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "c.db", create=True)
    texts = [("w", "l"), ("l", "w"), ("e", "f"), ("same", "same"), ("n", "m")]
    models = ("runs/dpo", "runs/sft")
    store.add_pairs([NewPair(f"Q{n}", *pair, "f", *models) for n, pair in enumerate(texts)])
    for pair, verdict in ((1, "a"), (2, "b"), (3, "both_bad")):
        vote_of(store, pair, "anna", verdict)  # type: ignore[arg-type]
    vote_of(store, 1, "ben", "a")
    found = results(store)
    assert (found["model"], found["baseline"]) == models
    assert (found["num_wins"], found["num_ties"], found["num_losses"]) == (2, 2, 1)
    assert found["win_rate"] == (2 + 2 / 2) / 5
    assert (found["num_undecided"], found["num_pairs"], found["num_prompts"]) == (1, 5, 5)
    assert found["win_rate_low"] < found["win_rate"] < found["win_rate_high"]
