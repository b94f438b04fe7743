"""Preference losses without a reference model; every argument (B,), result (B,)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.losses.arguments import check_positive, check_same_shape
from fastalign.losses.preference_length import per_token


def simpo(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    """-log sigmoid(beta * (mean log pi(c) - mean log pi(r)) - gamma), means over tokens.

    SimPO: Meng et al. (arXiv 2405.14734, eq. 6). Here gamma is the margin itself, not TRL's ratio
    of it to beta.

    Raises:
        ValueError: Shapes differ, or beta <= 0.
    """
    check_positive(beta=beta)
    check_same_shape(
        policy_chosen_logprob=policy_chosen_logprob,
        policy_rejected_logprob=policy_rejected_logprob,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
    )
    chosen = per_token(policy_chosen_logprob, chosen_length)
    rejected = per_token(policy_rejected_logprob, rejected_length)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """-mean log pi(c) - beta * log sigmoid(log odds(c) - log odds(r)).

    ORPO: Hong et al. (arXiv 2403.07691, eqs. 4, 6 and 7): odds = p / (1 - p) with p the geometric
    mean of the tokens' probabilities; the paper's lambda is `beta`.

    Raises:
        ValueError: Shapes differ, or beta <= 0.
    """
    check_positive(beta=beta)
    check_same_shape(
        policy_chosen_logprob=policy_chosen_logprob,
        policy_rejected_logprob=policy_rejected_logprob,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
    )
    chosen = per_token(policy_chosen_logprob, chosen_length)
    rejected = per_token(policy_rejected_logprob, rejected_length)
    return -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, element by element.

    Finite even where rounding makes p exactly 1: log p is taken as at most -eps of its dtype, and
    gets no gradient beyond it.
    """
    bounded = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    # log(1 - e^x) without cancellation: Maechler (2012), "Accurately computing log(1 - exp(-|a|))".
    # Each branch sees only values that it can take, or its NaN gradient would spread through where.
    near_one = bounded > -math.log(2.0)
    high = torch.where(near_one, bounded, -1.0)
    low = torch.where(near_one, -1.0, bounded)
    log_one_minus = torch.where(
        near_one, torch.log(-torch.expm1(high)), torch.log1p(-torch.exp(low))
    )
    return bounded - log_one_minus
