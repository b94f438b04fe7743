"""A language model as judge: every pair in both orders, and a verdict must survive both."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastalign.data.conversation import content_as_json, prompt_key
from fastalign.evaluation.judge.chat_endpoint import ChatEndpoint
from fastalign.evaluation.win_rate import AnswerPair, Judged

PLACEHOLDERS = ("prompt", "answer_a", "answer_b")
_PLACEHOLDER = re.compile(r"\{(prompt|answer_a|answer_b)\}")
_VERDICT = re.compile(r"\[\[\s*(a|b|tie)\s*\]\]", re.IGNORECASE)
# A verdict when the model's answer is A, and when it is B.
_AS_FIRST = {"A": "win", "B": "loss", "tie": "tie"}
_AS_SECOND = {"A": "loss", "B": "win", "tie": "tie"}


def read_template(path: str | None) -> str:
    """Return the template of the question: the file's text, or the built-in one.

    Raises:
        ValueError: if a placeholder is missing in it, or it is not UTF-8.
        FileNotFoundError: if there is no such file.
    """
    if path is None:
        package = files("fastalign.evaluation.judge")
        return package.joinpath("template.txt").read_text("utf-8")
    if not Path(path).is_file():
        raise FileNotFoundError(f"judge.template: no such file: {path}")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"judge.template: {path}: not UTF-8: {error}") from None
    missing = [name for name in PLACEHOLDERS if f"{{{name}}}" not in text]
    if missing:
        raise ValueError(f"judge.template: {path}: expected {{{missing[0]}}} in it")
    return text


def fill(template: str, prompt: str, answer_a: str, answer_b: str) -> str:
    """Fill in the template; placeholders in the values are left as they are."""
    values = {"prompt": prompt, "answer_a": answer_a, "answer_b": answer_b}
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def read_verdict(answer: str) -> str | None:
    """Return `A`, `B` or `tie`: the last in double brackets, or the whole answer; else None."""
    found = _VERDICT.findall(answer)
    word = found[-1] if found else answer.strip().rstrip(".")
    by_name = {"a": "A", "b": "B", "tie": "tie"}
    return by_name.get(word.lower())


def both_orders(first: str | None, second: str | None) -> str | None:
    """Return the verdict on the model, whose answer was A in the first question, B in the second.

    A verdict that changes with the order is a tie; if either is missing, there is none.
    """
    if first is None or second is None:
        return None
    one, other = _AS_FIRST[first], _AS_SECOND[second]
    return one if one == other else "tie"


def judge_pair(endpoint: ChatEndpoint, template: str, pair: AnswerPair) -> Judged:
    """Ask in both orders; identical answers are a tie without a question."""
    if pair.model == pair.baseline:
        return Judged("tie", {"answers": [], "read": []})
    prompt = prompt_key(content_as_json(pair.prompt))
    answers = [
        endpoint.ask(fill(template, prompt, pair.model, pair.baseline)),
        endpoint.ask(fill(template, prompt, pair.baseline, pair.model)),
    ]
    read = [read_verdict(answer) for answer in answers]
    return Judged(both_orders(*read), {"answers": answers, "read": read})


def judge_by_endpoint(
    endpoint: ChatEndpoint, template: str, pairs: Sequence[AnswerPair], concurrency: int
) -> Iterator[Judged]:
    """Yield verdicts in the pairs' order; `concurrency` pairs are judged at the same time.

    `details` holds the judge's two raw `answers` (the model's own answer is A in the first question
    and B in the second) and the verdicts `read` in them.

    Raises:
        ValueError: if the endpoint refuses, or fails for good; the other questions are not asked.
    """
    threads = ThreadPoolExecutor(concurrency)
    try:
        yield from threads.map(lambda pair: judge_pair(endpoint, template, pair), pairs)
    finally:
        # On a failure the others must not wait out their retries.
        endpoint.stop()
        threads.shutdown(cancel_futures=True)
        endpoint.close()


def judge_statistics(judged: Sequence[Judged]) -> dict[str, Any]:
    """Compute measures of the judge's reliability: unreadable answers, dependence on the order.

    `share_first` is the share of verdicts for answer A among those for A or B: 0.5 for a judge
    without a position bias.
    """
    asked = [found.details["read"] for found in judged if found.details["read"]]
    read = [verdict for pair in asked for verdict in pair]
    both = [pair for pair in asked if None not in pair]
    chosen = [verdict for verdict in read if verdict in ("A", "B")]
    changed = sum(_AS_FIRST[first] != _AS_SECOND[second] for first, second in both)
    return {
        "num_answers": len(read),
        "num_unparsable": read.count(None),
        "share_unparsable": read.count(None) / len(read) if read else 0.0,
        "share_order_dependent": changed / len(both) if both else 0.0,
        "share_first": chosen.count("A") / len(chosen) if chosen else None,
        "num_identical": len(judged) - len(asked),
    }
