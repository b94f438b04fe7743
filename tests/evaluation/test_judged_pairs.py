"""Measures of a reward model on held-out pairs, by hand; ties are neither right nor wrong."""

import math

import pytest
import torch

from fastalign.evaluation.judged_pairs import (
    JudgedPairs,
    calibration_bins,
    calibration_error,
    length_bins,
    pair_measures,
    wins,
)
from fastalign.evaluation.judged_pairs import with_tie_rate as tied
from fastalign.evaluation.pair_baselines import BagOfWordsBaseline


def judged(
    differences: list[float], tie: list[bool], lengths: list[tuple[int, int]] | None = None
) -> JudgedPairs:
    """Pairs under Bradley-Terry, with one pair in five a tie."""
    d = torch.tensor(differences, dtype=torch.float64)
    win, lose = torch.sigmoid(d).log(), torch.sigmoid(-d).log()
    outcomes = tied(torch.stack((win, lose, torch.full_like(d, -math.inf)), dim=-1), 0.2)
    rewards = torch.stack((d + 7, torch.full_like(d, 7.0)), dim=-1)
    sizes = torch.tensor(lengths or [(5, 4)] * len(differences))
    return JudgedPairs(rewards, outcomes, torch.tensor(tie), sizes)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_measures_by_hand() -> None:
    pairs = judged([2.0, -1.0, 0.0, 3.0], [False, False, False, True])
    found = pair_measures(pairs)
    # A hit, a miss, an equal pair that counts one half; the tie is left out.
    assert (found["accuracy"], found["accuracy_count"]) == (0.5, 3)
    assert found["accuracy_se"] == pytest.approx(0.5 / math.sqrt(3))
    assert (found["margin"], found["num_ties"]) == (pytest.approx(1 / 3), 1)
    untied = [log_sigmoid(2), log_sigmoid(-1), log_sigmoid(0)]
    assert found["log_likelihood_untied"] == pytest.approx(sum(untied) / 3)
    each = [*(value + math.log(0.8) for value in untied), math.log(0.2)]
    assert (found["log_likelihood"], found["log_likelihood_count"]) == (
        pytest.approx(sum(each) / 4),
        4,
    )
    mean = sum(each) / 4
    spread = math.sqrt(sum((value - mean) ** 2 for value in each) / 3)
    assert found["log_likelihood_se"] == pytest.approx(spread / 2)
    with pytest.raises(ValueError, match="at least one pair that is not a tie"):
        pair_measures(judged([1.0], [True]))


def test_a_tie_models_confidence_is_that_one_of_the_two_wins() -> None:
    # Win 0.3, loss 0.1, tie 0.6: given that one wins, the first does with 3 / 4.
    outcomes = torch.tensor([[0.3, 0.1, 0.6]], dtype=torch.float64).log()
    rewards, lengths = torch.tensor([[1.0, 0.0]]), torch.tensor([[1, 2]])
    pairs = JudgedPairs(rewards.double(), outcomes, torch.tensor([False]), lengths)
    (only,) = calibration_bins(pairs)
    assert only["confidence"] == pytest.approx(0.75)
    found = pair_measures(pairs)
    assert found["log_likelihood"] == pytest.approx(math.log(0.3))
    assert found["log_likelihood_untied"] == pytest.approx(math.log(0.75))


def test_calibration_bins_and_their_error_by_hand() -> None:
    def logit(p: float) -> float:
        return math.log(p / (1 - p))

    # Three of 0.91 (two right), one wrong of 0.62, one of certainty.
    pairs = judged([logit(0.91), logit(0.91), -logit(0.91), -logit(0.62), 50.0], [False] * 5)
    bins = calibration_bins(pairs)
    bounds = [(round(b["low"], 2), round(b["high"], 2), b["count"]) for b in bins]
    assert bounds == [(0.6, 0.65, 1), (0.9, 0.95, 3), (0.95, 1.0, 1)]
    assert [b["accuracy"] for b in bins] == [0, pytest.approx(2 / 3), 1]
    assert [b["confidence"] for b in bins] == [pytest.approx(x) for x in (0.62, 0.91, 1.0)]
    expected = (0.62 + 3 * (0.91 - 2 / 3) + 0) / 5
    assert calibration_error(bins) == pytest.approx(expected)


def test_length_bins_part_the_longer_from_the_shorter_winner() -> None:
    # Differences of length 1..10; the model always prefers the longer response.
    lengths = [(10 + n, 10) if n % 2 else (10, 10 + n) for n in range(1, 11)]
    differences = [1.0 if n % 2 else -1.0 for n in range(1, 11)]
    pairs = judged(differences, [False] * 10, lengths)
    bins = length_bins(pairs)
    assert [(b["low"], b["high"], b["count"]) for b in bins] == [
        (1, 2, 2),
        (3, 4, 2),
        (5, 6, 2),
        (7, 8, 2),
        (9, 10, 2),
    ]
    for b in bins:
        assert (b["accuracy_longer_won"], b["accuracy_shorter_won"]) == (1, 0)
        assert (b["count_longer_won"], b["count_shorter_won"]) == (1, 1)
        assert b["share_longer_won"] == 0.5
    found = pair_measures(pairs)
    assert (found["accuracy_longer_won"], found["accuracy_shorter_won"]) == (1, 0)


def test_bins_of_one_length_are_merged_and_equal_lengths_have_no_longer_one() -> None:
    lengths = [(4, 4)] * 7 + [(9, 4)] * 3
    bins = length_bins(judged([1.0] * 10, [False] * 10, lengths))
    assert [(b["low"], b["high"], b["count"]) for b in bins] == [(0, 0, 7), (1, 5, 3)]
    assert bins[0]["share_longer_won"] is None
    assert bins[0]["accuracy_longer_won"] is None
    assert (bins[1]["share_longer_won"], bins[1]["accuracy_shorter_won"]) == (1, None)


def test_a_tie_rate_leaves_probabilities_that_add_up_to_one() -> None:
    d = torch.linspace(-5, 5, 11, dtype=torch.float64)
    never = torch.full_like(d, -math.inf)
    plain = torch.stack((torch.sigmoid(d).log(), torch.sigmoid(-d).log(), never), dim=-1)
    found = tied(plain, 0.17).exp()
    torch.testing.assert_close(found.sum(-1), torch.ones_like(d))
    assert found[:, 2].tolist() == pytest.approx([0.17] * 11)
    torch.testing.assert_close(tied(plain, 0.0).exp(), plain.exp())


def test_the_longer_response_wins() -> None:
    assert wins(torch.tensor([5 - 4, 4 - 5, 3 - 3])).tolist() == [1, 0, 0.5]


def test_a_bag_of_words_is_logistic_regression_on_differences_of_counts() -> None:
    """One word, which the winner has once more than the loser in three pairs of four."""
    pairs = [
        ("good day", "day"),
        ("Good!", "bad bad"),
        ("a good one", "a one"),
        ("day", "good day"),
    ]
    words = BagOfWordsBaseline(pairs)
    asked = [("good", ""), ("", "good"), ("unseen", "else"), ("bad good", "bad")]
    margins = words.margin(asked)
    assert margins[0] > 0
    assert margins.tolist() == pytest.approx(
        [margins[0].item(), -margins[0].item(), 0.0, margins[0].item()]
    )
    # At the maximum the gradient is 0: sum of sigmoid(-m) x = w, for the penalty |w|^2 / 2.
    training = words.margin(pairs)
    away = torch.sigmoid(-training)
    good = (away * torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64)).sum()
    assert margins[0].item() == pytest.approx(good.item(), abs=1e-5)
    bad = words.margin([("", "bad")]).item()
    assert bad == pytest.approx(2 * away[1].item(), abs=1e-5)
    with pytest.raises(ValueError, match="at least one"):
        BagOfWordsBaseline([])
