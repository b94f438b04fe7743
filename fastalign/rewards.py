r"""Verifiable rewards: `--reward.sources fastalign.rewards:NAME`, or as functions in Python.

Each takes the completions and columns of the prompts' rows, by name, and returns one number for
each completion, mostly 1 or 0:

- `numeric_answer`: the final number is that of `answer` (GSM8K).
- `math_answer`: the formula in `\boxed{}` equals `answer`, by the package math-verify.
- `exact_match`: the text is `answer`.
- `regex_match`: the regular expression `pattern` is found.
- `length`: the number of words is at most `max_words`, and at least `min_words`.
"""

import re
import threading
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    math_answer: Callable[[Sequence[str], Sequence[Any]], list[float]]

__all__ = ["exact_match", "length", "math_answer", "numeric_answer", "regex_match"]

# 1,000.50, -3, .5, 3/4; the sign is one only where no operand stands before it.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)])-\s?)?\$?(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:\s?/\s?(?P<denominator>0*[1-9]\d*))?"
)
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")


def numeric_answer(completions: Sequence[str], answer: Sequence[Any]) -> list[float]:
    r"""Return 1 where a completion's final number equals that of the row's answer, else 0.

    It is the number behind the last `####`, else in the last `\boxed{}`, else the last one of the
    text; `1,000`, `$5`, `-2.50` and `3/4` are numbers. The comparison is exact.

    Args:
        completions: texts to score.
        answer: a number, or a text with one, such as a whole solution of GSM8K.

    Raises:
        ValueError: if an answer has no number.
    """
    rewards = []
    for completion, own in zip(completions, answer, strict=True):
        number = isinstance(own, int | float) and not isinstance(own, bool)
        try:  # in the form 1e-07, too
            expected = Fraction(Decimal(str(own))) if number else final_number(str(own))
        except (ValueError, OverflowError):  # NaN and infinity
            expected = None
        if expected is None:
            raise ValueError(f"answer: expected a number, or text with one, got {_shown(own)}")
        rewards.append(float(final_number(completion) == expected))
    return rewards


def final_number(text: str) -> Fraction | None:
    """Return the number that a text ends in, as `numeric_answer` describes it, or None."""
    _, marked, final = text.rpartition("####")
    boxed = _BOXED.findall(text)
    if not marked and not boxed:
        found = list(_NUMBER.finditer(text))
    else:
        found = list(_NUMBER.finditer(final if marked else boxed[-1]))[:1]
    if not found:
        return None
    number = Fraction(Decimal(found[-1]["number"].replace(",", "")))
    number /= Fraction(Decimal(found[-1]["denominator"] or 1))
    return -number if found[-1]["sign"] else number


def exact_match(completions: Sequence[str], answer: Sequence[Any]) -> list[float]:
    """Return 1 where a completion is the row's answer, but for white space around it, else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(text.strip() == str(own).strip()) for text, own in pairs]


def regex_match(completions: Sequence[str], pattern: Sequence[str]) -> list[float]:
    r"""Return 1 where the row's regular expression is found in the completion, else 0.

    It is one of Python's; a dot is any character, a line's end too. `\A...\Z` is the whole text.

    Raises:
        ValueError: if it is no regular expression.
    """
    rewards = []
    for text, own in zip(completions, pattern, strict=True):
        try:
            rewards.append(float(re.search(own, text, re.DOTALL) is not None))
        except (re.error, TypeError) as error:
            problem = f"expected a regular expression, got {_shown(own)}: {error}"
            raise ValueError(f"pattern: {problem}") from None
    return rewards


def length(
    completions: Sequence[str], max_words: Sequence[Any], min_words: Sequence[Any] | None = None
) -> list[float]:
    """Return 1 for a number of words within the row's limits, else the ratio to the limit, below 1.

    Words are separated by white space; without `min_words` a completion of no words has a 1.

    Raises:
        ValueError: if a limit is not a number of at least 1 (`max_words`) or 0 (`min_words`).
    """
    rewards = []
    lowest = [0] * len(completions) if min_words is None else min_words
    for text, most, least in zip(completions, max_words, lowest, strict=True):
        words = len(text.split())
        upper, lower = _limit("max_words", most, 1), _limit("min_words", least, 0)
        rewards.append(min(1.0, upper / words if words else 1.0, words / lower if lower else 1.0))
    return rewards


def _limit(name: str, value: Any, least: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not number >= least:
        raise ValueError(f"{name}: expected a number of at least {least}, got {_shown(value)}")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def __getattr__(name: str) -> Any:
    """Return `math_answer` if its package is there, so that a run without it ends as it begins."""
    if name != "math_answer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import math_verify  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(
            "reward: fastalign.rewards:math_answer needs math-verify: pip install 'fastalign[math]'"
        ) from None
    return _math_answer


def _math_answer(completions: Sequence[str], answer: Sequence[Any]) -> list[float]:
    r"""Return 1 where the formula that a completion ends in equals the row's answer, else 0.

    It stands in `\boxed{}`, or as LaTeX behind "The answer is"; the row's may be a plain number.
    math-verify compares them (`1/2`, `0.5` and `\frac12` are equal), for 5 seconds each at most.

    Raises:
        ValueError: if an answer cannot be read.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    # Its clock is a signal, which only the main thread can get.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    written = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    rewards = []
    for completion, own in zip(completions, answer, strict=True):
        expected = parse(str(own), parsing_timeout=seconds)
        if not expected:
            raise ValueError(f"answer: expected a number or a formula, got {_shown(own)}")
        found = parse(completion, written, parsing_timeout=seconds)
        rewards.append(float(verify(expected, found, timeout_seconds=seconds)))
    return rewards
