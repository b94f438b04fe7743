"""Pairs of answers, verdicts by a reward, and intervals against published or simulated numbers."""

import math

import pytest
import torch

from fastalign.data.conversation import Message
from fastalign.evaluation.statistics import share_interval, wilson_interval
from fastalign.evaluation.win_rate import (
    AnswerPair,
    Judged,
    judge_by_reward,
    pair_answers,
    win_rate,
)

CHAT = (Message("user", "Well?"),)


def test_wilson_against_published_numbers() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I (method 3): 81 of 263, 15 of 148, 0 of 20
    for hits, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson_interval(hits / count, count)
        assert found == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_single_answers_are_independent_several_are_not() -> None:
    single = share_interval([[1.0], [0.0], [], [0.5]])
    assert single.method == "wilson"
    assert (single.low, single.high) == wilson_interval(0.5, 3)
    # 40 prompts, on each of which 8 answers all win or all lose: 40 cases, not 320
    groups = [[float(number % 2)] * 8 for number in range(40)]
    several = share_interval(groups)
    assert several.method == "bootstrap over prompts"
    half = 1.96 * 0.5 / math.sqrt(40)
    assert several.low == pytest.approx(0.5 - half, abs=0.03)
    assert several.high == pytest.approx(0.5 + half, abs=0.03)
    assert share_interval(groups) == several  # the resampling has a seed of its own


def test_no_spread_between_prompts_is_not_certainty() -> None:
    found = share_interval([[1.0, 1.0], [1.0, 1.0], [1.0]])
    assert found.method == "wilson over prompts"
    assert (found.low, found.high) == wilson_interval(1.0, 3)
    assert found.low < 0.5
    with pytest.raises(ValueError, match="at least one value"):
        share_interval([[], []])


def test_the_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        share = torch.rand(60, 1, generator=generator, dtype=torch.float64)  # a prompt's own
        wins = (torch.rand(60, 4, generator=generator, dtype=torch.float64) < share).double()
        found = share_interval(wins.tolist())
        covered += found.low <= 0.5 <= found.high
    assert 178 <= covered <= 199  # 190 expected, standard deviation 3.1; slightly narrow is known


def test_answers_are_paired_by_number() -> None:
    model = {"x": ["a", "b"], CHAT: ["c"]}
    baseline = {CHAT: ["d"], "x": ["e", "f"]}
    assert pair_answers(model, baseline) == [
        AnswerPair("x", "a", "e", 0),
        AnswerPair("x", "b", "f", 1),
        AnswerPair(CHAT, "c", "d", 0),
    ]


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ({"x": ["e"]}, "expected 2 answers to 'x', as many as the model's, got 1"),
        ({"x": ["e", "f"], "y" * 90: ["g"]}, r"the first is 'yyyy.*\.\.\.$"),
        ({}, "1 prompts have answers of one side only, the first is 'x'"),
    ],
)
def test_answers_that_do_not_pair_are_named(baseline: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_answers({"x": ["a", "b"]}, baseline)


def test_the_larger_reward_wins() -> None:
    pairs = [
        AnswerPair("x", "long", "me", 0),
        AnswerPair("x", "me", "you", 1),
        AnswerPair(CHAT, "me", "we", 0),
    ]
    seen = []

    def longer(prompts: list[object], completions: list[str]) -> list[float]:
        seen.append(prompts)
        return [float(len(text)) for text in completions]

    judged = judge_by_reward(longer, pairs)
    assert [found.verdict for found in judged] == ["win", "loss", "tie"]
    assert judged[0].details == {"model_reward": 4.0, "baseline_reward": 2.0}
    assert seen == [["x", "x", [{"role": "user", "content": "Well?"}]]] * 2


def test_the_rate_counts_ties_half_and_leaves_out_what_has_no_verdict() -> None:
    pairs = [AnswerPair(str(number), "a", "b", 0) for number in range(5)]
    verdicts = ["win", "win", "tie", "loss", None]
    result = win_rate(pairs, [Judged(verdict, {}) for verdict in verdicts])
    low, high = wilson_interval(0.625, 4)
    assert result == {
        "win_rate": 0.625,
        "win_rate_low": low,
        "win_rate_high": high,
        "interval": "95 %, wilson",
        "num_wins": 2,
        "num_ties": 1,
        "num_losses": 1,
        "num_undecided": 1,
        "num_pairs": 5,
        "num_prompts": 5,
    }
    with pytest.raises(ValueError, match="none of 5 pairs has one"):
        win_rate(pairs, [Judged(None, {})] * 5)
