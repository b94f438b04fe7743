"""Losses beside those of installed peers, TRL's and Liger's, on equal numbers in float64."""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from liger_kernel.chunked_loss.cpo_loss import LigerFusedLinearCPOFunction
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction
from torch import Tensor
from trl import DPOTrainer

from fastalign import losses
from fastalign.losses.chunk_losses import ppo_loss_fn
from fastalign.ops import TokenChunk
from fastalign.ops.preference_loss.pairs import PairLogprobs
from fastalign.trainers import Cispo, Clip, ConstantMean, Gspo, SequenceMean, TokenMean
from fastalign.trainers.ppo.advantages import LossMean, PolicyObjective

LENGTHS = [
    3,
    6,
    4,
    5,
    2,
    6,
    3,
    4,
]  # four chosen responses, then four rejected ones, as TRL has them
SIZE = max(LENGTHS)
MASK = torch.arange(SIZE) < torch.tensor(LENGTHS)[:, None]


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def logprobs(seed: int) -> Tensor:
    """Of tokens (8, SIZE), 0 behind a response's end."""
    return torch.where(MASK, -normal(seed, 8, SIZE).abs() - 0.1, 0.0)


def pairs(logprob: Tensor, reference: Tensor) -> PairLogprobs:
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    lengths = torch.tensor(LENGTHS)[order]
    sums, of_reference = (each.sum(1)[order] for each in (logprob, reference))
    return PairLogprobs.from_responses(sums, of_reference, lengths)


def trl_dpo(logprob: Tensor, reference: Tensor, loss_type: str, **settings: Any) -> Tensor:
    """TRL's loss of the batch, by the trainer's own code, from given log-probs of tokens."""

    def model(**_: Any) -> SimpleNamespace:
        zeros = torch.zeros(8, SIZE)
        return SimpleNamespace(
            log_probs=logprob, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    def same(value: Any) -> Any:
        return value

    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        model=SimpleNamespace(training=False),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=0.3,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    vars(trainer).update(settings)
    mask = torch.cat([torch.zeros(8, 1), MASK], dim=1).long()
    of_reference = reference.sum(1)
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": of_reference[:4],
        "ref_rejected_logps": of_reference[4:],
    }
    with nullcontext():
        found: Tensor = DPOTrainer._compute_loss(trainer, model, inputs, False)
    return found


@pytest.mark.parametrize(
    ("name", "options", "loss_type", "settings"),
    [
        ("dpo", {}, "sigmoid", {}),
        ("dpo_robust", {"label_smoothing": 0.2}, "robust", {"label_smoothing": 0.2}),
        ("hinge", {}, "hinge", {}),
        ("ipo_mean", {}, "ipo", {}),
        ("dpo_length_normalised", {}, "sigmoid_norm", {}),
        ("apo_zero", {}, "apo_zero", {}),
        ("apo_down", {}, "apo_down", {}),
        ("dpo_forward_kl", {}, "sigmoid", {"f_divergence_type": "forward_kl"}),
        ("dpo_jensen_shannon", {}, "sigmoid", {"f_divergence_type": "js_divergence"}),
    ],
)
def test_preference_losses_are_trls(
    name: str, options: dict[str, float], loss_type: str, settings: dict[str, Any]
) -> None:
    ours, theirs = logprobs(1).requires_grad_(), logprobs(1).requires_grad_()
    made = losses.formula(getattr(losses, name), beta=0.3, **options)
    found = made(pairs(ours, logprobs(2))).mean()
    expected = trl_dpo(theirs, logprobs(2), loss_type, **settings)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, ours)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, theirs)[0])


def test_the_alpha_divergence_is_trls() -> None:
    # TRL computes its exponentials in float32.
    ours, theirs = logprobs(1).float(), logprobs(1).float()
    made = losses.formula(losses.dpo_alpha_divergence, beta=0.3, alpha=0.3)
    found = made(pairs(ours, logprobs(2).float())).mean()
    settings = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}
    expected = trl_dpo(theirs, logprobs(2).float(), "sigmoid", **settings)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_and_cpo_are_ligers(smoothing: float) -> None:
    logprob = logprobs(1)
    found = pairs(logprob, logprob)
    mean = logprob.sum(1) / MASK.sum(1)
    rest = (torch.zeros(8), 2.0, 0.4, smoothing)
    expected, *_ = LigerFusedLinearSimPOFunction.preference_loss_fn(mean[:4], mean[4:], *rest)
    ours = losses.formula(losses.simpo, beta=2.0, gamma=0.4, label_smoothing=smoothing)(found)
    torch.testing.assert_close(ours.mean(), expected)
    sums = logprob.sum(1)
    expected, *_ = LigerFusedLinearCPOFunction.preference_loss_fn(
        sums[:4], sums[4:], torch.zeros(8), 0.3
    )
    ours = losses.formula(losses.cpo, beta=0.3, nll_coefficient=0.0)(found)
    torch.testing.assert_close(ours.mean(), expected)


ADVANTAGE = torch.tensor([1.0, -1.0, 0.5, -0.7, 2.0, -2.0, 0.1, 0.1], dtype=torch.float64)


@pytest.mark.parametrize(
    ("objective", "mean", "settings"),
    [
        (Clip(), TokenMean(), {"loss_type": "dapo"}),
        (Clip(), SequenceMean(), {"loss_type": "grpo"}),
        (Clip(), ConstantMean(9), {"loss_type": "dr_grpo", "max_completion_length": 9}),
        (Clip(0.1, 0.3), TokenMean(), {"epsilon_low": 0.1, "epsilon_high": 0.3}),
        (Clip(dual_clip=1.4), TokenMean(), {"delta": 1.4}),
        (
            Gspo(0.02, 0.03),
            SequenceMean(),
            {
                "loss_type": "grpo",
                "importance_sampling_level": "sequence",
                "epsilon_low": 0.02,
                "epsilon_high": 0.03,
            },
        ),
        (Cispo(1.2), TokenMean(), {"loss_type": "cispo", "epsilon_high": 1.2}),
        (Clip(), TokenMean(), {"beta": 0.3}),
        (Clip(), TokenMean(), {"beta": 0.3, "use_bias_correction_kl": True}),
    ],
)
@pytest.mark.parametrize("on_policy", [False, True])
def test_policy_losses_are_ligers(
    objective: PolicyObjective, mean: LossMean, settings: dict[str, Any], on_policy: bool
) -> None:
    ours, theirs = logprobs(1).requires_grad_(), logprobs(1).requires_grad_()
    old = torch.where(MASK, logprobs(1) + 0.3 * normal(3, 8, SIZE), 0.0)
    weight, bounds = 1.0 + 0.1 * normal(4, 8, SIZE).abs(), [0, *torch.tensor(LENGTHS).cumsum(0)]
    bounds = [int(bound) for bound in bounds]
    expected, (*_, clipped) = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        theirs,
        MASK.double(),
        ADVANTAGE,
        MASK.double(),
        logprobs(2),
        None if on_policy else old,
        vllm_is_ratio=weight,
        **{"beta": 0.0, **settings},
    )
    target = torch.ones(bounds[-1], dtype=torch.bool)
    token_weight = mean.token_weight(torch.tensor(bounds))
    loss_fn = ppo_loss_fn(
        None if on_policy else old[MASK],
        ADVANTAGE[:, None].expand(8, SIZE)[MASK],
        policy_terms=objective.terms,
        response_bounds=bounds,
        weight=weight[MASK],
        token_weight=token_weight,
        reference_logprob=logprobs(2)[MASK],
        kl_coefficient=settings.get("beta", 0.0),
        max_k3=1e9,
        kl_by_ratio=settings.get("use_bias_correction_kl", False),
        normaliser=mean.divisor(LENGTHS, 100),
    )
    chunk = TokenChunk(ours[MASK], torch.zeros(len(target)), target, target, 0, len(target), 0, 8)
    found, sums = loss_fn(chunk)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, ours)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, theirs)[0])
    if settings.get("loss_type") != "cispo" and "delta" not in settings:
        torch.testing.assert_close(sums["policy/clipfrac_avg"] / len(target), clipped)
