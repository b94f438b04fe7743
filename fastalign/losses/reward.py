"""Losses of a reward model, per pair; B pairs.

The probabilities of winning and tying depend on the difference of two rewards only, so adding a
constant to every reward changes nothing but the centring term.

`rao_kupper_outcomes` and `davidson_outcomes` are the two models of ties; the losses of labels and
of vote shares are computed from them. Their arguments: `difference` (B,), the reward of the first
(or chosen) response minus that of the second; `tie` (B,) bool, pairs that are ties; `shares`
(B, 3), of the votes for the first, the second and a tie, which sum to 1 in each row; `nu`, a number
above 1 (Rao-Kupper) or 0 (Davidson), or a tensor () that may be learned, of Rao-Kupper also (B,),
one for each pair. Each function raises a
`ValueError` if shapes differ or nu is out of its range.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.losses.arguments import check_positive, check_same_shape, check_shares


def bradley_terry(
    chosen_reward: Tensor,  # (B,)
    rejected_reward: Tensor,  # (B,)
    *,
    margin: Tensor | None = None,  # (B,)
    centring_coefficient: float = 0.0,
) -> Tensor:
    """Return -log sigmoid(r_c - r_r - margin) + centring_coefficient * (r_c + r_r)^2, (B,).

    Bradley and Terry (1952), as in InstructGPT (arXiv 2203.02155, eq. 1). The margin is that of
    Llama 2 (arXiv 2307.09288, eq. 2). The centring term of Eisenstein et al. (arXiv 2312.09244,
    section 4) fixes the constant that the rest leaves free.

    Raises:
        ValueError: if shapes differ.
    """
    check_same_shape(chosen_reward=chosen_reward, rejected_reward=rejected_reward, margin=margin)
    difference = chosen_reward - rejected_reward
    if margin is not None:
        difference = difference - margin
    loss = -F.logsigmoid(difference)
    if centring_coefficient:
        loss = loss + centring_coefficient * (chosen_reward + rejected_reward).square()
    return loss


def bradley_terry_votes(
    first_reward: Tensor,  # (B,)
    second_reward: Tensor,  # (B,)
    shares: Tensor,  # (B, 3)
    *,
    margin: Tensor | None = None,  # (B,)
    centring_coefficient: float = 0.0,
) -> Tensor:
    """Return the cross-entropy (B,) of vote shares with Bradley and Terry's probabilities.

    A vote for a tie is half a vote for each side: with w = shares_first + shares_tie / 2 and
    d = r_1 - r_2 - margin, the loss is -w log sigmoid(d) - (1 - w) log sigmoid(-d), plus the
    centring term of `bradley_terry`. If all votes are for the first, it is `bradley_terry`.

    Args:
        first_reward: reward of the first response.
        second_reward: reward of the second response.
        shares: shares of the votes for the first, the second, and a tie; each row sums to 1.
        margin: as in `bradley_terry`.
        centring_coefficient: as in `bradley_terry`.

    Raises:
        ValueError: if shapes differ.
    """
    check_same_shape(first_reward=first_reward, second_reward=second_reward, margin=margin)
    check_shares(shares, first_reward)
    difference = first_reward - second_reward
    if margin is not None:
        difference = difference - margin
    win = shares[:, 0] + shares[:, 2] / 2
    loss = -win * F.logsigmoid(difference) - (1.0 - win) * F.logsigmoid(-difference)
    if centring_coefficient:
        loss = loss + centring_coefficient * (first_reward + second_reward).square()
    return loss


def rao_kupper_outcomes(difference: Tensor, *, nu: float | Tensor) -> Tensor:
    """Return log-probabilities (B, 3) of a win, a loss and a tie under Rao and Kupper's model.

    Rao and Kupper (1967), as used by Chen et al. (arXiv 2409.17431). With difference d = r_1 - r_2:
    p(win) = sigmoid(d - ln nu); p(tie) = (nu^2 - 1) sigmoid(d - ln nu) sigmoid(-d - ln nu). At
    d = 0, p(tie) = (nu - 1) / (nu + 1): one half for nu = 3.
    """
    if not (nu > 1.0).all() if isinstance(nu, Tensor) else not nu > 1.0:
        raise ValueError(f"nu: expected a number above 1, got {nu}")
    threshold = _log(nu)
    win = F.logsigmoid(difference - threshold)
    loss = F.logsigmoid(-difference - threshold)
    return torch.stack((win, loss, _log(nu * nu - 1.0) + win + loss), dim=-1)


def davidson_outcomes(difference: Tensor, *, nu: float | Tensor) -> Tensor:
    """Return log-probabilities (B, 3) of a win, a loss and a tie under Davidson's model.

    Davidson (1970), as used by Chen et al. (arXiv 2409.17431). With difference d = r_1 - r_2:
    p(win) = 1 / (1 + e^-d + 2 nu e^(-d/2)); p(tie) = 2 nu e^(-d/2) over the same denominator. At
    d = 0, p(tie) = nu / (nu + 1): one half for nu = 1.
    """
    check_positive(nu=nu)
    weights = torch.stack(
        (torch.zeros_like(difference), -difference, _log(2.0 * nu) - difference / 2), dim=-1
    )
    return weights - torch.logsumexp(weights, dim=-1, keepdim=True)


def rao_kupper(difference: Tensor, tie: Tensor, *, nu: float | Tensor) -> Tensor:
    """Return -log p (B,) of a win, or of a tie where `tie`, under `rao_kupper_outcomes`."""
    check_same_shape(difference=difference, tie=tie)
    return _of_label(rao_kupper_outcomes(difference, nu=nu), tie)


def davidson(difference: Tensor, tie: Tensor, *, nu: float | Tensor) -> Tensor:
    """Return -log p (B,) of a win, or of a tie where `tie`, under `davidson_outcomes`."""
    check_same_shape(difference=difference, tie=tie)
    return _of_label(davidson_outcomes(difference, nu=nu), tie)


def rao_kupper_votes(difference: Tensor, shares: Tensor, *, nu: float | Tensor) -> Tensor:
    """Return the cross-entropy (B,) of vote shares under `rao_kupper_outcomes`."""
    check_shares(shares, difference)
    return -(shares * rao_kupper_outcomes(difference, nu=nu)).sum(-1)


def davidson_votes(difference: Tensor, shares: Tensor, *, nu: float | Tensor) -> Tensor:
    """Return the cross-entropy (B,) of vote shares under `davidson_outcomes`."""
    check_shares(shares, difference)
    return -(shares * davidson_outcomes(difference, nu=nu)).sum(-1)


def _of_label(outcomes: Tensor, tie: Tensor) -> Tensor:
    return -torch.where(tie, outcomes[:, 2], outcomes[:, 0])


def _log(value: float | Tensor) -> float | Tensor:
    return value.log() if isinstance(value, Tensor) else math.log(value)
