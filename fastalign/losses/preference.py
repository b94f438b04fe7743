"""Preference losses against a reference model, per pair; B pairs, every argument (B,), result (B,).

Notation: pi policy, rho reference, c chosen, r rejected; log-probs are of whole responses, and

    h = (log pi(c) - log rho(c)) - (log pi(r) - log rho(r)).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.losses.arguments import check_label_smoothing, check_positive, check_same_shape
from fastalign.losses.reward import davidson, rao_kupper


def log_ratio_difference(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
) -> Tensor:
    """The h of this module's head, (B,): beta * h is the difference of implicit rewards.

    Raises:
        ValueError: Shapes differ.
    """
    check_same_shape(
        policy_chosen_logprob=policy_chosen_logprob,
        policy_rejected_logprob=policy_rejected_logprob,
        reference_chosen_logprob=reference_chosen_logprob,
        reference_rejected_logprob=reference_rejected_logprob,
    )
    chosen = policy_chosen_logprob - reference_chosen_logprob
    return chosen - (policy_rejected_logprob - reference_rejected_logprob)


def dpo(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """-log sigmoid(beta * h): Rafailov et al. (arXiv 2305.18290, eq. 7).

    Raises:
        ValueError: Shapes differ, or beta <= 0.
    """
    check_positive(beta=beta)
    h = log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    return -F.logsigmoid(beta * h)


def dpo_label_smoothed(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Conservative DPO (cDPO), for labels that are wrong with probability e = label_smoothing.

    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h): Mitchell, "A note on DPO with noisy
    preferences" (2023), eq. 3.

    Raises:
        ValueError: Shapes differ, beta <= 0, or not 0 <= label_smoothing < 0.5.
    """
    check_label_smoothing(label_smoothing)
    check_positive(beta=beta)
    h = log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    right, wrong = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
    return -(1.0 - label_smoothing) * right - label_smoothing * wrong


def dpo_robust(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Robust DPO (rDPO): an unbiased estimate of DPO's loss on clean labels; may be negative.

    (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e), for labels that are wrong
    with probability e = label_smoothing: Chowdhury et al. (arXiv 2403.00409, eq. 12).

    Raises:
        ValueError: Shapes differ, beta <= 0, or not 0 <= label_smoothing < 0.5.
    """
    check_label_smoothing(label_smoothing)
    check_positive(beta=beta)
    h = log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    right, wrong = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
    corrected = -(1.0 - label_smoothing) * right + label_smoothing * wrong
    return corrected / (1.0 - 2.0 * label_smoothing)


def hinge(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """max(0, 1 - beta * h): SLiC (arXiv 2305.10425, eq. 1), on DPO's implicit rewards.

    That is RSO's reading of it (arXiv 2309.06657, eq. 10).

    Raises:
        ValueError: Shapes differ, or beta <= 0.
    """
    check_positive(beta=beta)
    h = log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    return torch.relu(1.0 - beta * h)


def ipo_sum(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """(h - 1 / (2 beta))^2 on whole-response log-probs: Azar et al. (arXiv 2310.12036, eq. 17).

    The paper's tau is `beta`. See `ipo_mean` for what TRL calls "ipo".

    Raises:
        ValueError: Shapes differ, or beta <= 0.
    """
    check_positive(beta=beta)
    h = log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    return (h - 1.0 / (2.0 * beta)).square()


def dpo_rao_kupper(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    tie: Tensor,
    *,
    beta: float = 0.1,
    nu: float = 3.0,
) -> Tensor:
    """DPO with ties after Rao and Kupper: Chen et al. (arXiv 2409.17431); see `reward.rao_kupper`.

    Raises:
        ValueError: Shapes differ, beta <= 0, or nu <= 1.
    """
    check_positive(beta=beta)
    h = log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    return rao_kupper(beta * h, tie, nu=nu)


def dpo_davidson(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    tie: Tensor,
    *,
    beta: float = 0.1,
    nu: float = 1.0,
) -> Tensor:
    """DPO with ties after Davidson: Chen et al. (arXiv 2409.17431); see `reward.davidson`.

    Raises:
        ValueError: Shapes differ, beta <= 0, or nu <= 0.
    """
    check_positive(beta=beta)
    h = log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    return davidson(beta * h, tie, nu=nu)
