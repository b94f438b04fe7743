"""The best of n over all subsets, against enumeration; the bound of its KL, against the KL."""

import math
from itertools import combinations

import pytest

from fastalign.evaluation.measures import best_of_n, best_of_n_kl_bound, best_of_n_reward

REWARDS = [3.0, -1.0, 2.0, 2.0, 5.0, 0.5]
SCORES = [1.0, 1.0, 4.0, 0.0, 1.0, 4.0]  # what chooses: ties among the best and in the middle


def test_by_hand() -> None:
    # {1, 2} -> 2, {1, 3} -> 3, {2, 3} -> 3
    assert best_of_n_reward([3.0, 1.0, 2.0], 2) == pytest.approx(8 / 3)
    assert best_of_n_reward([3.0, 1.0, 2.0], 1) == pytest.approx(2.0)
    assert best_of_n_reward([3.0, 1.0, 2.0], 3) == 3.0


@pytest.mark.parametrize("scores", [REWARDS, SCORES, [7.0] * 6], ids=["own", "other", "all alike"])
@pytest.mark.parametrize("n", range(1, 7))
def test_equals_the_mean_over_all_subsets(scores: list[float], n: int) -> None:
    values = []
    for subset in combinations(range(6), n):
        best = max(scores[i] for i in subset)
        alike = [REWARDS[i] for i in subset if scores[i] == best]
        values.append(math.fsum(alike) / len(alike))
    expected = math.fsum(values) / len(values)
    found = best_of_n_reward(REWARDS, n, None if scores is REWARDS else scores)
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_error_is_over_prompts() -> None:
    found = best_of_n([[0.0, 2.0], [1.0, 7.0], [4.0, 3.0]], 2)
    assert (found.mean, found.count) == (pytest.approx(13 / 3), 3)
    assert found.standard_error == pytest.approx(math.sqrt(19 / 3 / 3))


def test_many_answers_do_not_overflow() -> None:
    rewards = [float(i) for i in range(1, 2049)]
    # the mean of the largest of n of 1..N is n (N + 1) / (n + 1)
    assert best_of_n_reward(rewards, 1024) == pytest.approx(1024 * 2049 / 1025, rel=1e-12)


@pytest.mark.parametrize("n", [0, 3])
def test_an_impossible_n_is_named(n: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to the 2 answers of a prompt, got {n}"):
        best_of_n_reward([1.0, 2.0], n)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_the_bound_is_above_the_kl_and_met_by_many_distinct_answers(n: int) -> None:
    def kl(num_answers: int) -> float:
        """Of the best of n draws from equally likely answers, each better than the one before."""
        total = 0.0
        for i in range(1, num_answers + 1):
            share = (i / num_answers) ** n - ((i - 1) / num_answers) ** n
            total += share * math.log(share * num_answers) if share else 0.0
        return total

    assert kl(5) <= best_of_n_kl_bound(n) + 1e-12
    assert kl(20_000) == pytest.approx(best_of_n_kl_bound(n), abs=2e-3)
    if n > 1:
        assert kl(5) < best_of_n_kl_bound(n) - 0.01
