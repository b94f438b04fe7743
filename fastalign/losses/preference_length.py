"""Preference losses against a reference model that know the responses' lengths; all (B,).

Notation as in `preference`: pi policy, rho reference, c chosen, r rejected, |.| target tokens.
"""

import torch.nn.functional as F
from torch import Tensor

from fastalign.losses.arguments import check_positive, check_same_shape
from fastalign.losses.preference import log_ratio_difference


def per_token(logprob: Tensor, length: Tensor) -> Tensor:
    """The mean log-prob of a response's tokens, (B,); 0 for an empty response."""
    return logprob / length.clamp(min=1).to(logprob.dtype)


def _mean_log_ratio_difference(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
) -> Tensor:
    check_same_shape(
        policy_chosen_logprob=policy_chosen_logprob,
        policy_rejected_logprob=policy_rejected_logprob,
        reference_chosen_logprob=reference_chosen_logprob,
        reference_rejected_logprob=reference_rejected_logprob,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
    )
    return log_ratio_difference(
        per_token(policy_chosen_logprob, chosen_length),
        per_token(policy_rejected_logprob, rejected_length),
        per_token(reference_chosen_logprob, chosen_length),
        per_token(reference_rejected_logprob, rejected_length),
    )


def ipo_mean(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17) on log-probs per token: what TRL calls "ipo".

    (h - 1 / (2 beta))^2 with h of mean log-probs. The paper's own is `ipo_sum`.

    Raises:
        ValueError: Shapes differ, or beta <= 0.
    """
    check_positive(beta=beta)
    h = _mean_log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
        chosen_length,
        rejected_length,
    )
    return (h - 1.0 / (2.0 * beta)).square()


def dpo_length_normalised(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """DPO on log-probs per token: -log sigmoid(beta * h) with h of mean log-probs.

    Tulu 3 (arXiv 2411.15124, eq. 6); TRL's "sigmoid_norm", open-instruct's "dpo_norm". It wants a
    larger beta: Tulu 3 takes 5.

    Raises:
        ValueError: Shapes differ, or beta <= 0.
    """
    check_positive(beta=beta)
    h = _mean_log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
        chosen_length,
        rejected_length,
    )
    return -F.logsigmoid(beta * h)


def dpo_length_penalised(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.01,
) -> Tensor:
    """R-DPO: -log sigmoid(beta * h + alpha * (|c| - |r|)): Park et al. (arXiv 2403.19159, eq. 9).

    A reward that pays alpha less for each token: a chosen answer that is longer counts as partly
    explained by its length, and is learnt less.

    Raises:
        ValueError: Shapes differ, beta <= 0, or alpha < 0.
    """
    check_positive(beta=beta)
    if not alpha >= 0:
        raise ValueError(f"alpha: expected a number not below 0, got {alpha}")
    h = log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    check_same_shape(h=h, chosen_length=chosen_length, rejected_length=rejected_length)
    longer = (chosen_length - rejected_length).to(h.dtype)
    return -F.logsigmoid(beta * h + alpha * longer)
