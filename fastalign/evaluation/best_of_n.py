"""Best of n: the reward of choosing among n answers, from one set of N >= n samples."""

import math
from collections.abc import Sequence
from itertools import groupby

from fastalign.evaluation.statistics import Estimate, estimate


def best_of_n_reward(
    rewards: Sequence[float], n: int, scores: Sequence[float] | None = None
) -> float:
    """Expected reward of the best of n of these N answers, over all subsets of n; unbiased.

    In rising order of what chooses, answer i of N (from 1) is the best of C(i - 1, n - 1) subsets
    of the C(N, n). Answers that are chosen alike share their subsets equally.

    Args:
        rewards: (N,) of one prompt's answers.
        n: answers to choose from.
        scores: (N,) what chooses the best; None: the rewards themselves.

    Raises:
        ValueError: fewer than n answers, or n below 1.
    """
    if not 1 <= n <= len(rewards):
        raise ValueError(
            f"best_of: expected n from 1 to the {len(rewards)} answers of a prompt, got {n}"
        )
    chosen_by = rewards if scores is None else scores
    ordered = sorted(zip(chosen_by, rewards, strict=True), key=lambda pair: pair[0])
    subsets, total, rank = math.comb(len(rewards), n), 0.0, 0
    for _, alike in groupby(ordered, key=lambda pair: pair[0]):
        block = [reward for _, reward in alike]
        # Subsets whose best is in the block: those within the first `rank + len(block)` answers
        # that are not within the first `rank`.
        won = math.comb(rank + len(block), n) - math.comb(rank, n)
        rank += len(block)
        total += won / subsets * (math.fsum(block) / len(block))
    return total


def best_of_n(
    rewards: Sequence[Sequence[float]], n: int, scores: Sequence[Sequence[float]] | None = None
) -> Estimate:
    """Mean over prompts of `best_of_n_reward`; the standard error is over prompts."""
    chosen_by = rewards if scores is None else scores
    return estimate(
        [
            best_of_n_reward(of_prompt, n, by)
            for of_prompt, by in zip(rewards, chosen_by, strict=True)
        ]
    )


def best_of_n_kl_bound(n: int) -> float:
    """Most that KL(best of n || the model sampled from) can be, in nats: log n - (n - 1) / n.

    The KL itself where no two answers are alike; below it for models that repeat themselves
    (Beirami et al. 2024, arXiv 2401.01879, who show that it is a bound).
    """
    return math.log(n) - (n - 1) / n
