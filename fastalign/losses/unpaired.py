"""Losses of single responses that were found good or bad; B responses, arguments and result (B,).

Log-probs are of whole responses.
"""

import torch
from torch import Tensor

from fastalign.losses.arguments import check_positive, check_same_shape


def kto(
    policy_logprob: Tensor,  # (B,)
    reference_logprob: Tensor,  # (B,)
    desirable: Tensor,  # (B,) bool
    kl: float | Tensor,  # or ()
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return KTO's losses (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7 and 8), (B,).

    With the log-ratio r = log pi - log rho, w_D (1 - sigmoid(beta (r - kl))) of a desirable
    response, and w_U (1 - sigmoid(beta (kl - r))) of an undesirable one.

    Args:
        policy_logprob: log-probs under the policy.
        reference_logprob: log-probs under the reference; no gradient flows.
        desirable: True for the responses that were found good.
        kl: the paper's z_0, an estimate of KL(pi || rho), see `kto_kl`; no gradient flows.
        beta: strength of the pull towards the reference, above 0.
        desirable_weight: the paper's lambda_D, above 0.
        undesirable_weight: the paper's lambda_U, above 0.

    Raises:
        ValueError: if shapes differ, or a number is not above 0.
    """
    check_same_shape(
        policy_logprob=policy_logprob, reference_logprob=reference_logprob, desirable=desirable
    )
    check_positive(
        beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    kl = kl.detach() if isinstance(kl, Tensor) else kl
    gain = beta * (policy_logprob - reference_logprob.detach() - kl)
    good = desirable_weight * torch.sigmoid(-gain)
    return torch.where(desirable, good, undesirable_weight * torch.sigmoid(gain))


def kto_kl(policy_logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """Return KTO's estimate of KL(pi || rho), () and detached (arXiv 2402.01306, section 4.1).

    The mean log-ratio of responses to other prompts than their own, at least 0: z_0 says how much
    likelier the policy makes any response, so that only what is beyond it counts as a gain.

    Args:
        policy_logprob: log-probs (B,) of the mismatched responses under the policy.
        reference_logprob: log-probs (B,) under the reference.

    Raises:
        ValueError: if shapes differ.
    """
    check_same_shape(policy_logprob=policy_logprob, reference_logprob=reference_logprob)
    return (policy_logprob - reference_logprob).detach().double().mean().clamp(min=0.0)
