"""A trained reward model's measures on held-out pairs, beside baselines: `eval/eval.json`."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.batch.packed import Group
from fastalign.batch.schedule import indices_of_step
from fastalign.batch.stored import stored
from fastalign.compute import Compute, require_finite
from fastalign.data.load import TokenizedDataset
from fastalign.data.tokenizer import Tokenizer
from fastalign.evaluation.judged_pairs import JudgedPairs, wins, with_tie_rate
from fastalign.evaluation.pair_baselines import BagOfWordsBaseline
from fastalign.evaluation.statistics import estimate, summary
from fastalign.models.forward import response_values
from fastalign.models.reward import response_reward, set_reward_scale
from fastalign.progress import phase
from fastalign.ranks.parallel import enter
from fastalign.trainers.reward.config import RewardLoss
from fastalign.written_files import write_atomically

# Pairs whose responses' scores have mean 0 and standard deviation 1 once they are normalised.
NUM_SCALE_PAIRS = 512
# The bag of words is trained on no more pairs than these: a baseline may not cost hours.
NUM_BASELINE_PAIRS = 20000


def pair_rewards(model: Any, groups: Sequence[Group], compute: Compute) -> Tensor:
    """Return raw scores of pairs, (N, 2) float64 on the CPU."""
    with phase("scores of pairs", 2 * len(groups), "responses"):
        rewards = response_values(
            lambda batch: enter(model, lambda: response_reward(model, batch, compute)),
            groups,
            compute,
        )
    scores = torch.stack(rewards).double()
    require_finite(scores, "scores of the reward model")
    return scores


def measure_scale(model: Any, data: TokenizedDataset, compute: Compute, seed: int) -> None:
    """Write the scores' mean and deviation over some training pairs into the model."""
    count = min(NUM_SCALE_PAIRS, len(data.groups))
    chosen = [data.groups[i] for i in indices_of_step(data.mixture, count, 0, seed=seed)]
    set_reward_scale(model, pair_rewards(model, chosen, compute).flatten())


def judge_pairs(
    model: Any,
    loss: RewardLoss,
    nu: Tensor | None,
    rate: float | None,
    data: TokenizedDataset,
    compute: Compute,
) -> JudgedPairs:
    """Return held-out pairs with the model's rewards and probabilities.

    `nu` is the learned one, (), or None. `rate` is the probability of a tie under a model without
    ties, so that likelihoods of all pairs can be compared between models.
    """
    rewards = pair_rewards(model, data.groups, compute)
    outcomes = loss.outcomes(rewards[:, 0] - rewards[:, 1], nu)
    if rate is not None:
        outcomes = with_tie_rate(outcomes, rate)
    return JudgedPairs(rewards, outcomes, torch.tensor(data.ties), response_lengths(data))


def response_lengths(data: TokenizedDataset) -> Tensor:
    """Return the number of tokens of each pair's responses, (N, 2)."""
    groups = stored(data.groups)
    return torch.tensor(groups.response_lengths).view(len(groups), groups.num_responses)


def baseline_measures(
    train: TokenizedDataset, held_out: TokenizedDataset, tokenizer: Tokenizer
) -> dict[str, object]:
    """Return the accuracy of two baselines on pairs that are no ties: longer wins, bag of words."""
    lengths = response_lengths(held_out)[~torch.tensor(held_out.ties)]
    hits = {"longer_wins_accuracy": wins(lengths[:, 0] - lengths[:, 1])}
    if not all(train.ties):
        words = BagOfWordsBaseline(texts_of(train, tokenizer, NUM_BASELINE_PAIRS))
        hits["bag_of_words_accuracy"] = wins(words.margin(texts_of(held_out, tokenizer)))
    measures: dict[str, object] = {}
    for name, values in hits.items():
        measures |= summary(name, estimate(values.tolist()))
    return measures


def tie_rate(train: TokenizedDataset, needed: bool) -> float:
    """Share of the training rows that are ties, dropped ones counted.

    Where ties must have a probability and there were none to learn it from, half a tie is counted.
    """
    report = train.report
    total = report.num_used + report.num_ties_dropped
    ties = report.num_ties + report.num_ties_dropped
    return (ties or (0.5 if needed else 0.0)) / total


def texts_of(
    data: TokenizedDataset, tokenizer: Tokenizer, limit: int | None = None
) -> list[tuple[str, str]]:
    """Return the texts of the first `limit` pairs that are no ties, the preferred one first."""
    untied = [group for group, tie in zip(data.groups, data.ties, strict=True) if not tie]

    def text(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=True)

    return [(text(group.response_ids[0]), text(group.response_ids[1])) for group in untied[:limit]]


def pair_rows(pairs: JudgedPairs, sources: Sequence[str]) -> list[dict[str, object]]:
    """Return each pair's row in the file, whether it is a tie, raw scores and log-likelihood."""
    names = ("source", "tie", "first_reward", "second_reward", "log_likelihood")
    columns = (sources, pairs.tie, *pairs.rewards.unbind(1), pairs.log_likelihood())
    values = [c.tolist() if isinstance(c, Tensor) else c for c in columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


def write_evaluation(
    folder: Path, measures: dict[str, object], rows: Sequence[dict[str, object]]
) -> None:
    """Write `eval.json` and `pairs.jsonl`; a number that JSON cannot hold becomes a string."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in measures.items()
    }
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(folder / "pairs.jsonl", lines)
    write_atomically(folder / "eval.json", json.dumps(plain, indent=1) + "\n")
