"""Losses of a reward model, per pair; B pairs.

The probabilities of winning and tying depend on the difference of two rewards only, so adding a
constant to every reward changes nothing (but for the centring term).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.losses.arguments import check_positive, check_same_shape


def bradley_terry(
    chosen_reward: Tensor,  # (B,)
    rejected_reward: Tensor,  # (B,)
    *,
    margin: Tensor | None = None,  # (B,)
    centring_coefficient: float = 0.0,
) -> Tensor:
    """-log sigmoid(r_c - r_r - margin) + centring_coefficient * (r_c + r_r)^2, (B,).

    Bradley and Terry (1952), as in InstructGPT (arXiv 2203.02155, eq. 1); the margin is that of
    Llama 2 (arXiv 2307.09288, eq. 2); the centring term, which fixes the constant that the rest
    leaves free, is of Eisenstein et al. (arXiv 2312.09244, section 4).

    Raises:
        ValueError: Shapes differ.
    """
    check_same_shape(chosen_reward=chosen_reward, rejected_reward=rejected_reward, margin=margin)
    difference = chosen_reward - rejected_reward
    if margin is not None:
        difference = difference - margin
    loss = -F.logsigmoid(difference)
    if centring_coefficient:
        loss = loss + centring_coefficient * (chosen_reward + rejected_reward).square()
    return loss


def rao_kupper(difference: Tensor, tie: Tensor, *, nu: float | Tensor) -> Tensor:
    """Negative log-likelihood (B,) of a win, or of a tie where `tie`, under Rao and Kupper's model.

    Rao and Kupper (1967), as used by Chen et al. (arXiv 2409.17431). With difference d = r_c - r_r:
    p(win) = sigmoid(d - ln nu); p(tie) = (nu^2 - 1) sigmoid(d - ln nu) sigmoid(-d - ln nu).

    Args:
        difference: (B,) reward of the chosen minus that of the rejected.
        tie: (B,) bool.
        nu: Above 1; at d = 0, p(tie) = (nu - 1) / (nu + 1), so nu = 3 ties with one half. A tensor
            () may be learned.

    Raises:
        ValueError: nu <= 1, or shapes differ.
    """
    if not nu > 1.0:
        raise ValueError(f"nu: expected a number above 1, got {nu}")
    check_same_shape(difference=difference, tie=tie)
    threshold = _log(nu)
    win = F.logsigmoid(difference - threshold)
    loss_or_win = F.logsigmoid(-difference - threshold)
    return -torch.where(tie, _log(nu * nu - 1.0) + win + loss_or_win, win)


def davidson(difference: Tensor, tie: Tensor, *, nu: float | Tensor) -> Tensor:
    """Negative log-likelihood (B,) of a win, or of a tie where `tie`, under Davidson's model.

    Davidson (1970), as used by Chen et al. (arXiv 2409.17431). With difference d = r_c - r_r:
    p(win) = 1 / (1 + e^-d + 2 nu e^(-d/2)); p(tie) = 2 nu e^(-d/2) over the same denominator.

    Args:
        difference: (B,) reward of the chosen minus that of the rejected.
        tie: (B,) bool.
        nu: Above 0; at d = 0, p(tie) = nu / (nu + 1), so nu = 1 ties with one half. A tensor ()
            may be learned.

    Raises:
        ValueError: nu <= 0, or shapes differ.
    """
    check_positive(nu=nu)
    check_same_shape(difference=difference, tie=tie)
    log_tie_weight = _log(2.0 * nu) - difference / 2
    terms = torch.stack((torch.zeros_like(difference), -difference, log_tie_weight))
    log_denominator = torch.logsumexp(terms, dim=0)
    return log_denominator - torch.where(tie, log_tie_weight, 0.0)


def _log(value: float | Tensor) -> float | Tensor:
    return value.log() if isinstance(value, Tensor) else math.log(value)
