"""The reward of the recipe for summaries: overlap with the row's own summary."""

from collections.abc import Sequence
from functools import cache

from rouge_score.rouge_scorer import RougeScorer


@cache
def scorer() -> RougeScorer:
    """Return the scorer of the rouge-score package."""
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(completions: Sequence[str], summary: Sequence[str]) -> list[float]:
    """Return the F-measure of ROUGE-L of each completion and the summary of its row."""
    return [
        scorer().score(own, text)["rougeL"].fmeasure
        for text, own in zip(completions, summary, strict=True)
    ]
