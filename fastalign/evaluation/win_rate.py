"""Win rate of one model's answers against another's: answer pairs, verdicts, and the share won."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastalign.data.conversation import content_as_json
from fastalign.data.examples import Content
from fastalign.evaluation.rewards import RewardFunction, apply_reward
from fastalign.evaluation.statistics import share_interval

# Score of each verdict for the model that is judged.
SCORES = {"win": 1.0, "tie": 0.5, "loss": 0.0}
Answers = Mapping[Content, Sequence[str]]  # of each prompt


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to one prompt.

    Attributes:
        prompt: plain text, or the messages.
        model: the answer that is judged.
        baseline: the answer it is compared with.
        sample: number of the answer among the prompt's answers.
    """

    prompt: Content
    model: str
    baseline: str
    sample: int


@dataclass(frozen=True)
class Judged:
    """The verdict on a pair.

    Attributes:
        verdict: `win`, `tie` or `loss` of the model; None: the judge's reply had none.
        details: rewards, or the judge's replies, which are written beside the result.
    """

    verdict: str | None
    details: dict[str, Any]


def pair_answers(model: Answers, baseline: Answers) -> list[AnswerPair]:
    """Pair the k-th answers to each prompt, in the model's order.

    Raises:
        ValueError: if the prompts, or the numbers of answers to one, differ.
    """
    missing = [prompt for prompt in model if prompt not in baseline]
    missing += [prompt for prompt in baseline if prompt not in model]
    if missing:
        raise ValueError(
            f"baseline: expected answers to the model's prompts; {len(missing)} prompts have "
            f"answers of one side only, the first is {shorten(missing[0])}"
        )
    pairs = []
    for prompt, answers in model.items():
        if len(answers) != len(baseline[prompt]):
            raise ValueError(
                f"baseline: expected {len(answers)} answers to {shorten(prompt)}, as many as the "
                f"model's, got {len(baseline[prompt])}"
            )
        for number, sides in enumerate(zip(answers, baseline[prompt], strict=True)):
            pairs.append(AnswerPair(prompt, *sides, number))
    return pairs


def shorten(prompt: Content) -> str:
    """Return the beginning of a prompt in quotes."""
    text = repr(content_as_json(prompt))
    return text if len(text) <= 60 else text[:57] + "..."


def judge_by_reward(
    function: RewardFunction,
    pairs: Sequence[AnswerPair],
    source: str | None = None,
    columns: Sequence[Mapping[str, Sequence[Any]]] = ({}, {}),
) -> list[Judged]:
    """Judge pairs by a reward: the larger one wins, equal ones tie; as for `apply_reward`.

    `columns` are those of the model's answers and of the baseline's.
    """
    prompts = [pair.prompt for pair in pairs]
    texts = ([pair.model for pair in pairs], [pair.baseline for pair in pairs])
    ours, theirs = (
        apply_reward(function, prompts, own, source, given)
        for own, given in zip(texts, columns, strict=True)
    )
    return [
        Judged(
            "tie" if own == other else "win" if own > other else "loss",
            {"model_reward": own, "baseline_reward": other},
        )
        for own, other in zip(ours, theirs, strict=True)
    ]


def win_rate(pairs: Sequence[AnswerPair], judged: Sequence[Judged]) -> dict[str, Any]:
    """Compute the share of pairs that the model won, ties as one half, with a 95 % interval.

    Pairs without a verdict are counted, but left out of the share.

    Raises:
        ValueError: if no pair has a verdict.
    """
    by_prompt: dict[Content, list[float]] = {}
    for pair, found in zip(pairs, judged, strict=True):
        scores = by_prompt.setdefault(pair.prompt, [])
        if found.verdict is not None:
            scores.append(SCORES[found.verdict])
    decided = [score for scores in by_prompt.values() for score in scores]
    if not decided:
        raise ValueError(f"judge: expected a verdict, none of {len(pairs)} pairs has one")
    interval = share_interval(list(by_prompt.values()))
    return {
        "win_rate": math.fsum(decided) / len(decided),
        "win_rate_low": interval.low,
        "win_rate_high": interval.high,
        "interval": f"95 %, {interval.method}",
        "num_wins": decided.count(1.0),
        "num_ties": decided.count(0.5),
        "num_losses": decided.count(0.0),
        "num_undecided": len(pairs) - len(decided),
        "num_pairs": len(pairs),
        "num_prompts": len(by_prompt),
    }
