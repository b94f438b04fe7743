"""Preference losses of both log-ratios of a pair, which are no function of their difference.

Each is registered and written as those of `losses.preference`, whose notation is used here; a pair
has the log-ratios r_c and r_r, r = log pi - log rho. No kernel computes them: the head is fused,
and PyTorch evaluates their few numbers. Each raises a `ValueError` if shapes differ or a parameter
is out of its range: beta > 0, 0 < alpha < 1.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.losses.arguments import check_positive, check_same_shape
from fastalign.losses.formulas import pair_loss
from fastalign.losses.preference import Beta

# Bound of a divergence's exponent, as in TRL; e^80 is a float32.
MAX_EXPONENT = 80.0


def log_ratios(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the log-ratios log pi - log rho of the chosen and of the rejected responses.

    Raises:
        ValueError: if shapes differ.
    """
    check_same_shape(
        policy_chosen_logprob=policy_chosen_logprob,
        policy_rejected_logprob=policy_rejected_logprob,
        reference_chosen_logprob=reference_chosen_logprob,
        reference_rejected_logprob=reference_rejected_logprob,
    )
    chosen = policy_chosen_logprob - reference_chosen_logprob
    return chosen, policy_rejected_logprob - reference_rejected_logprob


@pair_loss()
def apo_zero(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """APO-zero, arXiv 2408.06266: raises the chosen, lowers the rejected response.

    Return 1 - sigmoid(beta * r_c) + sigmoid(beta * r_r), r = log pi - log rho: D'Oosterlinck et al.
    (2024), eq. 7. For chosen responses that are better than the model's own.
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


@pair_loss()
def apo_down(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """APO-down, arXiv 2408.06266: lowers both responses, the rejected one more.

    Return sigmoid(beta * r_c) + 1 - sigmoid(beta * (r_c - r_r)), r = log pi - log rho:
    D'Oosterlinck et al. (2024), eq. 8. For chosen responses that are worse than the model's own.
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


@pair_loss()
def dpo_forward_kl(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """DPO under the forward KL, arXiv 2309.16240.

    Return -log sigmoid(beta * (f'(t_c) - f'(t_r))), t = pi / rho, with f'(t) = -1/t: Wang et al.
    (2023), table 1. A log-ratio counts as at least -80.
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    inverse = [torch.exp((-each).clamp(max=MAX_EXPONENT)) for each in (chosen, rejected)]
    return -F.logsigmoid(beta * (inverse[1] - inverse[0]))


@pair_loss()
def dpo_jensen_shannon(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """DPO under the Jensen-Shannon divergence, arXiv 2309.16240.

    Return -log sigmoid(beta * (f'(t_c) - f'(t_r))), t = pi / rho, with f'(t) = log(2 t / (1 + t)):
    Wang et al. (2023), table 1.
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    return -F.logsigmoid(beta * (F.logsigmoid(chosen) - F.logsigmoid(rejected)))


@pair_loss()
def dpo_alpha_divergence(
    policy_chosen_logprob: Tensor,
    policy_rejected_logprob: Tensor,
    reference_chosen_logprob: Tensor,
    reference_rejected_logprob: Tensor,
    *,
    beta: Beta = 0.1,
    alpha: Annotated[
        float, "In (0, 1): near 0 it is DPO's reverse KL, near 1 the forward KL."
    ] = 0.5,
) -> Tensor:
    """DPO under an alpha-divergence, arXiv 2309.16240.

    Return -log sigmoid(beta * (f'(t_c) - f'(t_r))), t = pi / rho, with
    f'(t) = (1 - t^-alpha) / alpha: Wang et al. (2023), table 1. TRL's
    `f_alpha_divergence_coef` is 1 - alpha. The exponent is at most 80.
    """
    check_positive(beta=beta)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: expected a number in (0, 1), got {alpha}")
    chosen, rejected = log_ratios(
        policy_chosen_logprob,
        policy_rejected_logprob,
        reference_chosen_logprob,
        reference_rejected_logprob,
    )
    power = [torch.exp((-alpha * each).clamp(max=MAX_EXPONENT)) for each in (chosen, rejected)]
    return -F.logsigmoid(beta / alpha * (power[1] - power[0]))
