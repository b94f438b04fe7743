"""Preference losses: each is one function of B pairs; arguments and result are (B,).

A function here is the whole definition of its loss. `pair_loss` registers it for the kernels of
`ops.preference_loss` and for the command line: `--loss NAME` is the function's name, the first line
of its docstring is the loss's help, and its keyword parameters are the flags `--loss.PARAMETER`.

Notation: pi policy, rho reference, c chosen, r rejected, |.| number of target tokens; log-probs are
of whole responses, and

    h = (log pi(c) - log rho(c)) - (log pi(r) - log rho(r)).

Each raises a `ValueError` if shapes differ or a parameter is out of its range: beta > 0,
0 <= label_smoothing < 0.5, alpha >= 0, nu > 1 (Rao-Kupper) or nu > 0 (Davidson),
nll_coefficient >= 0.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.losses.arguments import (
    check_label_smoothing,
    check_not_negative,
    check_positive,
    check_same_shape,
)
from fastalign.losses.formulas import pair_loss
from fastalign.losses.reward import davidson, rao_kupper
from fastalign.ops.preference_loss import LinkFunction, PairLink

Beta = Annotated[
    float,
    "Strength of the pull towards the reference, or the loss's scale if it has no reference.",
]
LabelSmoothing = Annotated[float, "Assumed share of wrong labels."]


def per_token(logprob: Tensor, length: Tensor | None) -> Tensor:
    """Return the mean log-prob of a response's tokens, (B,), 0 if it is empty; None: the sum."""
    return logprob if length is None else logprob / length.clamp(min=1).to(logprob.dtype)


def log_ratio_difference(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
) -> Tensor:
    """Return h, (B,), of mean log-probs if lengths are given: beta * h is the rewards' difference.

    Raises:
        ValueError: if shapes differ.
    """
    check_same_shape(
        policy_chosen_logprob=policy_chosen_logprob,
        policy_rejected_logprob=policy_rejected_logprob,
        reference_chosen_logprob=reference_chosen_logprob,
        reference_rejected_logprob=reference_rejected_logprob,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
    )
    sides = (
        (policy_chosen_logprob, reference_chosen_logprob, chosen_length),
        (policy_rejected_logprob, reference_rejected_logprob, rejected_length),
    )
    chosen, rejected = (per_token(p, length) - per_token(r, length) for p, r, length in sides)
    return chosen - rejected


@pair_loss(lambda beta: PairLink(LinkFunction.LOGISTIC, beta=beta))
def dpo(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """DPO, arXiv 2305.18290.

    Return -log sigmoid(beta * h): Rafailov et al. (2023), eq. 7.
    """
    check_positive(beta=beta)
    h = log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    return -F.logsigmoid(beta * h)


@pair_loss(
    lambda beta, label_smoothing: PairLink(
        LinkFunction.LOGISTIC, beta=beta, right=1.0 - label_smoothing, wrong=label_smoothing
    )
)
def dpo_label_smoothed(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    *,
    beta: Beta = 0.1,
    label_smoothing: LabelSmoothing = 0.1,
) -> Tensor:
    """cDPO, DPO with label smoothing.

    Return -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), for labels that are wrong with
    probability e = label_smoothing: Mitchell, "A note on DPO with noisy preferences" (2023), eq. 3.
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


@pair_loss(
    lambda beta, label_smoothing: PairLink(
        LinkFunction.LOGISTIC,
        beta=beta,
        right=(1.0 - label_smoothing) / (1.0 - 2.0 * label_smoothing),
        wrong=-label_smoothing / (1.0 - 2.0 * label_smoothing),
    )
)
def dpo_robust(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    *,
    beta: Beta = 0.1,
    label_smoothing: LabelSmoothing = 0.1,
) -> Tensor:
    """rDPO, arXiv 2403.00409.

    Return (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e), for labels that are
    wrong with probability e = label_smoothing: Chowdhury et al. (2024), eq. 12. An unbiased
    estimate of DPO's loss on clean labels, so it may be negative.
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


@pair_loss(lambda beta: PairLink(LinkFunction.HINGE, beta=beta))
def hinge(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """Hinge, arXiv 2305.10425.

    Return max(0, 1 - beta * h): SLiC (Zhao et al. 2023, eq. 1) on DPO's implicit rewards, as in
    RSO (arXiv 2309.06657, eq. 10).
    """
    check_positive(beta=beta)
    h = log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    return torch.relu(1.0 - beta * h)


@pair_loss(lambda beta: PairLink(LinkFunction.SQUARE, threshold=1.0 / (2.0 * beta)))
def ipo_sum(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """IPO on sequence log-probs, arXiv 2310.12036.

    Return (h - 1 / (2 beta))^2: Azar et al. (2023), eq. 17, whose tau is `beta`. TRL's "ipo" is
    `ipo_mean`.
    """
    check_positive(beta=beta)
    h = log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    return (h - 1.0 / (2.0 * beta)).square()


def _mean_logprobs(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
) -> tuple[Tensor, Tensor]:
    check_same_shape(
        policy_chosen_logprob=policy_chosen_logprob,
        policy_rejected_logprob=policy_rejected_logprob,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
    )
    chosen = per_token(policy_chosen_logprob, chosen_length)
    return chosen, per_token(policy_rejected_logprob, rejected_length)


@pair_loss(lambda beta: PairLink(LinkFunction.SQUARE, per_token=True, threshold=1.0 / (2.0 * beta)))
def ipo_mean(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """IPO on per-token means.

    Return (h - 1 / (2 beta))^2 with the h of mean log-probs: what TRL calls "ipo". The paper's own
    loss is `ipo_sum`.
    """
    check_positive(beta=beta)
    h = log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
        chosen_length,
        rejected_length,
    )
    return (h - 1.0 / (2.0 * beta)).square()


@pair_loss(lambda beta: PairLink(LinkFunction.LOGISTIC, per_token=True, beta=beta))
def dpo_length_normalised(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """DPO on per-token means, arXiv 2411.15124.

    Return -log sigmoid(beta * h) with the h of mean log-probs: Tulu 3 (Lambert et al. 2024), eq. 6;
    TRL's "sigmoid_norm", open-instruct's "dpo_norm". It needs a larger beta: Tulu 3 takes 5.
    """
    check_positive(beta=beta)
    h = log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
        chosen_length,
        rejected_length,
    )
    return -F.logsigmoid(beta * h)


@pair_loss(lambda beta, alpha: PairLink(LinkFunction.LOGISTIC, beta=beta, length_weight=alpha))
def dpo_length_penalised(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: Beta = 0.1,
    alpha: Annotated[float, "Penalty per token that the chosen response is longer."] = 0.01,
) -> Tensor:
    """R-DPO, arXiv 2403.19159.

    Return -log sigmoid(beta * h + alpha * (|c| - |r|)): Park et al. (2024), eq. 9. It is DPO with a
    reward that is lower by alpha for each token: a preference for a longer answer counts as partly
    explained by its length, and gets a smaller gradient.
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


def _simpo_link(beta: float, gamma: float, label_smoothing: float) -> PairLink | None:
    if label_smoothing:
        return None  # a smoothed margin is no member of the kernels' family
    return PairLink(LinkFunction.LOGISTIC, per_token=True, beta=beta, threshold=gamma)


@pair_loss(_simpo_link)
def simpo(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: Annotated[float, "Scale of the mean log-probs per token."] = 2.0,
    gamma: Annotated[float, "Target margin between chosen and rejected."] = 1.0,
    label_smoothing: LabelSmoothing = 0.0,
) -> Tensor:
    """SimPO, arXiv 2405.14734; no reference.

    Return -(1 - e) log sigmoid(m) - e log sigmoid(-m) with e = label_smoothing and
    m = beta * (mean log pi(c) - mean log pi(r)) - gamma, with means over tokens: Meng et al.
    (2024), eq. 6; the smoothing is the one of their code and of TRL. gamma is the margin itself, as
    in TRL (`simpo_gamma`).
    """
    check_positive(beta=beta)
    check_label_smoothing(label_smoothing)
    chosen, rejected = _mean_logprobs(
        policy_chosen_logprob, policy_rejected_logprob, chosen_length, rejected_length
    )
    margin = beta * (chosen - rejected) - gamma
    loss = -F.logsigmoid(margin)
    if label_smoothing:
        loss = (1.0 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin)
    return loss


@pair_loss(
    lambda beta, nll_coefficient: PairLink(
        LinkFunction.LOGISTIC, beta=beta, nll_coefficient=nll_coefficient
    )
)
def cpo(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    chosen_length: Tensor,
    *,
    beta: Beta = 0.1,
    nll_coefficient: Annotated[float, "Weight of the chosen response's cross-entropy."] = 1.0,
) -> Tensor:
    """CPO, arXiv 2401.08417; no reference.

    Return -log sigmoid(beta * (log pi(c) - log pi(r))) - nll_coefficient * mean log pi(c): Xu et
    al. (2024), section 3 and eq. 3. The mean is over the tokens of the response, where TRL's is
    over those of the micro-batch.
    """
    check_positive(beta=beta)
    check_not_negative(nll_coefficient=nll_coefficient)
    check_same_shape(
        policy_chosen_logprob=policy_chosen_logprob,
        policy_rejected_logprob=policy_rejected_logprob,
        chosen_length=chosen_length,
    )
    prefer = -F.logsigmoid(beta * (policy_chosen_logprob - policy_rejected_logprob))
    return prefer - nll_coefficient * per_token(policy_chosen_logprob, chosen_length)


@pair_loss(lambda beta: PairLink(LinkFunction.ORPO, per_token=True, beta=beta))
def orpo(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """ORPO, arXiv 2403.07691; no reference.

    Return -mean log pi(c) - beta * log sigmoid(log odds(c) - log odds(r)): Hong et al. (2024),
    eqs. 4, 6 and 7. The odds are p / (1 - p), with p the geometric mean of the tokens'
    probabilities; the paper's lambda is `beta`.
    """
    check_positive(beta=beta)
    chosen, rejected = _mean_logprobs(
        policy_chosen_logprob, policy_rejected_logprob, chosen_length, rejected_length
    )
    return -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(logprob: Tensor) -> Tensor:
    """Return log(p / (1 - p)) from log p, element by element.

    It is finite even where rounding makes p exactly 1: log p is clamped to at most -eps of its
    dtype, without a gradient where it is clamped.
    """
    bounded = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    # log(1 - e^x) without cancellation: Maechler (2012), "Accurately computing log(1 - exp(-|a|))".
    # Each branch gets only values in its domain: a NaN gradient would pass through `where`.
    near_one = bounded > -math.log(2.0)
    high = torch.where(near_one, bounded, -1.0)
    low = torch.where(near_one, -1.0, bounded)
    log_one_minus = torch.where(
        near_one, torch.log(-torch.expm1(high)), torch.log1p(-torch.exp(low))
    )
    return bounded - log_one_minus


@pair_loss(
    lambda beta, nu: PairLink(
        LinkFunction.LOGISTIC,
        beta=beta,
        threshold=math.log(nu),
        tie_offset=math.log(nu * nu - 1.0),
    )
)
def dpo_rao_kupper(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    tie: Tensor,
    *,
    beta: Beta = 0.1,
    nu: Annotated[
        float, "Frequency of ties: equal responses tie with probability (nu - 1) / (nu + 1)."
    ] = 3.0,
) -> Tensor:
    """DPO with ties, Rao-Kupper model, arXiv 2409.17431.

    Return `rao_kupper(beta * h, tie)`: Chen et al. (2024).
    """
    check_positive(beta=beta)
    h = log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    return rao_kupper(beta * h, tie, nu=nu)


@pair_loss(
    lambda beta, nu: PairLink(LinkFunction.DAVIDSON, beta=beta, tie_offset=math.log(2.0 * nu))
)
def dpo_davidson(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    tie: Tensor,
    *,
    beta: Beta = 0.1,
    nu: Annotated[
        float, "Frequency of ties: equal responses tie with probability nu / (nu + 1)."
    ] = 1.0,
) -> Tensor:
    """DPO with ties, Davidson model, arXiv 2409.17431.

    Return `davidson(beta * h, tie)`: Chen et al. (2024).
    """
    check_positive(beta=beta)
    h = log_ratio_difference(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    return davidson(beta * h, tie, nu=nu)
