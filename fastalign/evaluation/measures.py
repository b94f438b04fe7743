"""Measures of an aligned model: accuracy on pairs, KL of fresh samples, reward of the best of n."""

import math
from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

from fastalign.evaluation.statistics import Estimate, estimate, estimate_of_groups


def preference_accuracy(
    policy_logprob: Sequence[Tensor],  # each (2,): chosen, rejected
    reference_logprob: Sequence[Tensor],  # likewise
    ties: Sequence[bool],
) -> Estimate:
    """Estimate the share of pairs whose chosen response has the larger implicit reward.

    The implicit reward is beta * log(policy / reference) (DPO, arXiv 2305.18290, section 5); the
    share does not depend on beta. Ties are left out; equal rewards count as one half.

    Raises:
        ValueError: if all pairs are ties.
    """
    hits = []
    for policy, reference, tie in zip(policy_logprob, reference_logprob, ties, strict=True):
        if not tie:
            ratio = (policy - reference).tolist()
            hits.append(0.5 if ratio[0] == ratio[1] else float(ratio[0] > ratio[1]))
    if not hits:
        raise ValueError("data.pairs: expected at least one pair that is not a tie, got none")
    return estimate(hits)


def mean_margin(
    policy_logprob: Sequence[Tensor], reference_logprob: Sequence[Tensor], beta: float
) -> Estimate:
    """Estimate the mean difference of the implicit rewards of chosen and rejected."""
    margins = []
    for policy, reference in zip(policy_logprob, reference_logprob, strict=True):
        chosen, rejected = (policy - reference).tolist()
        margins.append(beta * (chosen - rejected))
    return estimate(margins)


def sampled_kl(policy_logprob: Sequence[Tensor], reference_logprob: Sequence[Tensor]) -> Estimate:
    """Estimate KL(policy || reference) in nats per sequence, from samples at temperature 1.

    The mean of log policy - log reference over samples (the k1 estimator: unbiased). Each tensor
    holds the samples of one prompt; the standard error is over prompts.
    """
    return estimate_of_groups(
        [
            (policy - reference).tolist()
            for policy, reference in zip(policy_logprob, reference_logprob, strict=True)
        ]
    )


def best_of_n_reward(
    rewards: Sequence[float], n: int, scores: Sequence[float] | None = None
) -> float:
    """Return the mean reward of the best of n of these N answers, over all subsets of n.

    The estimate is unbiased. In rising order of the scores, answer i of N (from 1) is the best of
    C(i - 1, n - 1) of the C(N, n) subsets. Answers with equal scores share their subsets equally.

    `rewards` and `scores` are one prompt's, (N,); the scores, by default the rewards themselves,
    choose the best answer.

    Raises:
        ValueError: if there are fewer than n answers, or n is below 1.
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
    """Estimate the mean of `best_of_n_reward` over prompts."""
    chosen_by = rewards if scores is None else scores
    return estimate(
        [
            best_of_n_reward(of_prompt, n, by)
            for of_prompt, by in zip(rewards, chosen_by, strict=True)
        ]
    )


def best_of_n_kl_bound(n: int) -> float:
    """Return the upper bound of KL(best of n || the model) in nats: log n - (n - 1) / n.

    It is the KL itself if no two answers are alike; the KL of a model that repeats itself is lower
    (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n
