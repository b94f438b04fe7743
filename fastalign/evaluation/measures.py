"""What an aligned model is judged by: accuracy on pairs, reward and KL of fresh samples."""

from collections.abc import Sequence

from torch import Tensor

from fastalign.evaluation.statistics import Estimate, estimate, estimate_of_groups


def preference_accuracy(
    policy_logprob: Sequence[Tensor],  # each (2,): chosen, rejected
    reference_logprob: Sequence[Tensor],  # likewise
    ties: Sequence[bool],
) -> Estimate:
    """Share of pairs whose chosen response has the larger implicit reward.

    The implicit reward is beta * log(policy / reference) (DPO, arXiv 2305.18290, section 5); the
    share does not depend on beta. Ties are left out; equal rewards count as one half.

    Raises:
        ValueError: no pair is left.
    """
    hits = []
    for policy, reference, tie in zip(policy_logprob, reference_logprob, ties, strict=True):
        if not tie:
            ratio = (policy - reference).tolist()
            hits.append(0.5 if ratio[0] == ratio[1] else float(ratio[0] > ratio[1]))
    if not hits:
        raise ValueError("data.pairs: expected at least one pair that is no tie, got none")
    return estimate(hits)


def mean_margin(
    policy_logprob: Sequence[Tensor], reference_logprob: Sequence[Tensor], beta: float
) -> Estimate:
    """Mean difference of the implicit rewards of chosen and rejected."""
    margins = []
    for policy, reference in zip(policy_logprob, reference_logprob, strict=True):
        chosen, rejected = (policy - reference).tolist()
        margins.append(beta * (chosen - rejected))
    return estimate(margins)


def sampled_kl(policy_logprob: Sequence[Tensor], reference_logprob: Sequence[Tensor]) -> Estimate:
    """KL(policy || reference) in nats a sequence, from samples of the policy at temperature 1.

    The mean of log policy - log reference over samples (the k1 estimator: unbiased). Each tensor
    holds the samples of one prompt; the standard error is over prompts.
    """
    return estimate_of_groups(
        [
            (policy - reference).tolist()
            for policy, reference in zip(policy_logprob, reference_logprob, strict=True)
        ]
    )
