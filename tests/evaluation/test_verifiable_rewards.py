"""The rewards of `fastalign.rewards` by hand."""

import sys
from typing import Any

import pytest

from fastalign import rewards
from fastalign.evaluation.rewards import apply_reward, columns_of, load_reward

HUGE = "9" * 6000  # more digits than Python's int reads of a text


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("48/2 = <<48/2=24>>24, 48+24 = 72 clips.", "... 48+24 = 72\n#### 72", 1),
        ("so 70, no:\n#### 72\n", "72", 1),
        ("#### 72 clips in 2 months", 72, 1),
        (r"\boxed{71}, no, \boxed{72}. That took 3 steps", 72.0, 1),
        ("71", "72", 0),
        ("", "72", 0),
        ("I do not know", "0", 0),
        ("$1,000.50", "1000.5", 1),
        ("1,2", "12", 0),
        ("1,2", "2", 1),
        ("1,2345", "12345", 0),
        ("He owes -3", "-3", 1),
        ("5-3", "-3", 0),
        ("5 -3", "-3", 1),
        ("0.50", "1/2", 1),
        ("3/0", "0", 1),
        (".5", 0.5, 1),
        ("0.0000001", 1e-07, 1),
        (HUGE, HUGE, 1),
        (HUGE + "8", HUGE, 0),
        ("####", "5", 0),
        ("5 ####", "5", 0),
    ],
)
def test_a_final_number(completion: str, answer: Any, reward: int) -> None:
    assert rewards.numeric_answer([completion], [answer]) == [reward]


@pytest.mark.parametrize("answer", ["none", None, True, float("nan"), float("inf")])
def test_an_answer_without_a_number_is_said_in_one_line(answer: Any) -> None:
    reward = load_reward("fastalign.rewards:numeric_answer")
    with pytest.raises(ValueError, match=r"^answer: expected a number, or text with one, got"):
        apply_reward(reward, ["a"], ["1"], "gsm8k", {"answer": [answer]})


def test_texts_patterns_and_lengths() -> None:
    texts = [" yes\n", "<think>a\nb</think> yes", "one two three four"]
    assert rewards.exact_match(texts, ["yes", "yes", 4]) == [1, 0, 0]
    assert rewards.exact_match(["4"], [4]) == [1]
    think = r"\A<think>.*</think>"
    assert rewards.regex_match(texts, [think] * 3) == [0, 1, 0]
    with pytest.raises(ValueError, match=r"^pattern: expected a regular expression, got '\('"):
        rewards.regex_match(["a"], ["("])
    assert rewards.length(texts, [4, 3, "3"]) == [1, 1, 0.75]
    assert rewards.length([*texts, ""], [9] * 4, [2, 2, 2, 1]) == [0.5, 1, 1, 0]
    assert rewards.length([""], [1]) == [1]
    with pytest.raises(ValueError, match=r"^max_words: expected a number of at least 1, got None"):
        rewards.length(["a"], [None])


def test_each_is_a_reward_of_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {
        "numeric_answer": (("answer",), ()),
        "exact_match": (("answer",), ()),
        "regex_match": (("pattern",), ()),
        "length": (("max_words",), ("min_words",)),
    }
    assert {*taken, "math_answer"} == set(rewards.__all__)
    for name, columns in taken.items():
        found = columns_of({name: load_reward(f"fastalign.rewards:{name}")})
        assert (found.required, found.optional, found.every) == (*columns, False)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"math_answer needs math-verify: pip install"):
        load_reward("fastalign.rewards:math_answer")


def test_formulas_are_compared_by_math_verify() -> None:
    pytest.importorskip("math_verify")
    texts = [
        r"\boxed{0.5}",
        r"The answer is $\frac12$.",
        r"\boxed{1+x^2}",
        r"\boxed{17}",
        "72",
        "72 $",
    ]
    answers = [r"\frac{1}{2}", "1/2", "$x^2+1$", "18", 72, 72]
    reward = load_reward("fastalign.rewards:math_answer")
    assert apply_reward(reward, texts, texts, columns={"answer": answers}) == [1, 1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match=r"^answer: expected a number or a formula, got 'no'"):
        apply_reward(reward, ["a"], ["b"], columns={"answer": ["no"]})
