"""Policy losses, advantages, whitening, the value loss and importance weights, by hand."""

import math

import pytest
import torch
from torch import Tensor

from fastalign.losses import (
    cispo,
    dr_grpo_advantage,
    grpo_advantage,
    gspo_clip,
    importance_weight,
    masked_importance_weight,
    ppo_clip,
    rloo_advantage,
    value_clipped,
    whiten,
)

SCORES = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0], dtype=torch.float64)
ADVANTAGES = [rloo_advantage, grpo_advantage, dr_grpo_advantage]


def test_leave_one_out_by_hand() -> None:
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2; a group of equal scores
    assert rloo_advantage(SCORES, 3).tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]
    assert rloo_advantage(SCORES, 2).tolist() == [-1.0, 1.0, 1.0, -1.0, 0.0, 0.0]


def test_group_relative_by_hand() -> None:
    # mean 3, standard deviation sqrt((4 + 1 + 9) / 2)
    found = grpo_advantage(SCORES, 3, eps=0.0001)
    std = math.sqrt(7) + 0.0001
    assert found[:3].tolist() == pytest.approx([-2 / std, -1 / std, 3 / std], rel=1e-12)
    assert found[3:].tolist() == [0.0, 0.0, 0.0]


def test_group_means_without_a_deviation_by_hand() -> None:
    assert dr_grpo_advantage(SCORES, 3).tolist() == [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("function", ADVANTAGES)
def test_groups_may_differ_in_size(function) -> None:  # type: ignore[no-untyped-def]
    found = function(SCORES, [2, 4])
    expected = torch.cat([function(SCORES[:2], 2), function(SCORES[2:], 4)])
    assert torch.equal(found, expected)
    assert torch.equal(function(SCORES, [3, 3]), function(SCORES, 3))
    assert function(SCORES[:0], []).shape == (0,)
    with pytest.raises(ValueError, match=r"score: expected \(5,\), the sum of .*, got \(6,\)"):
        function(SCORES, [2, 3])
    with pytest.raises(ValueError, match=r"num_samples: expected at least 2 .* got 1"):
        function(SCORES, [5, 1])


@pytest.mark.parametrize("function", ADVANTAGES)
def test_groups_that_cannot_be_compared_are_refused(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"num_samples: expected at least 2 .* got 1"):
        function(SCORES, 1)
    with pytest.raises(ValueError, match=r"score: expected \(R,\) with 4 .*, got \(6,\)"):
        function(SCORES, 4)


def test_whitening_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5
    std = math.sqrt(3.5)
    shifted = [-2 / std, -1 / std, 0.0, 3 / std]
    assert whiten(values).tolist() == pytest.approx(shifted, abs=1e-6)
    kept = whiten(values, shift_mean=False).tolist()
    assert kept == pytest.approx([value + 3 for value in shifted], abs=1e-6)
    assert whiten(torch.tensor([4.0])).tolist() == [0.0]


def test_the_clipped_value_loss_by_hand() -> None:
    value = torch.tensor([1.0, 0.6, 1.0, 0.2])
    old = torch.tensor([0.5, 0.5, 0.5, 0.5])
    returns = torch.tensor([2.0, 0.0, 0.6, 0.1])
    # Clipped to 0.7: (0.7 - 2)^2 is the larger; within the range; the unclipped is the larger
    # twice: (1 - 0.6)^2 over (0.7 - 0.6)^2, and clipped to 0.3: (0.3 - 0.1)^2 over (0.2 - 0.1)^2.
    expected = [1.69 / 2, 0.36 / 2, 0.16 / 2, 0.04 / 2]
    assert value_clipped(value, old, returns, clip_range=0.2).tolist() == pytest.approx(expected)
    plain = value_clipped(value, old, returns, clip_range=math.inf)
    torch.testing.assert_close(plain, (value - returns).square() / 2)


def test_the_clipped_value_loss_has_its_gradient_where_it_is_not_clipped() -> None:
    value = torch.tensor([1.0, 0.6, 1.0], dtype=torch.float64, requires_grad=True)
    old = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([2.0, 0.0, 0.6], dtype=torch.float64, requires_grad=True)
    value_clipped(value, old, returns).sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == pytest.approx([0.0, 0.6, 0.4])
    assert old.grad is None
    assert returns.grad is None
    with pytest.raises(ValueError, match="clip_range: expected a positive number, got 0"):
        value_clipped(value, old, returns, clip_range=0.0)
    with pytest.raises(ValueError, match=r"returns: expected \(3,\) as value has, got \(2,\)"):
        value_clipped(value, old, returns[:2])


def test_importance_weights_are_truncated_above() -> None:
    new = torch.tensor([0.0, -1.0, -1.0], requires_grad=True)
    sampler = torch.tensor([-1.0, -1.0, 0.0])
    found = importance_weight(new, sampler, max_weight=2.0)
    assert found.tolist() == pytest.approx([2.0, 1.0, math.exp(-1)])
    assert not found.requires_grad
    far = torch.tensor([200.0, -200.0])
    bounded = importance_weight(far, torch.zeros(2), max_weight=math.inf)
    assert bounded.tolist() == pytest.approx([math.exp(20), math.exp(-20)])
    with pytest.raises(ValueError, match="max_weight: expected a positive number, got 0"):
        importance_weight(new, sampler, max_weight=0)


def test_importance_weights_have_a_lower_bound_and_masks() -> None:
    new, sampler = torch.tensor([0.0, -1.0, -1.0, -2.0]), torch.tensor([-1.0, -1.0, 0.0, 0.0])
    ratio = [math.e, 1.0, math.exp(-1), math.exp(-2)]
    found = importance_weight(new, sampler, max_weight=2.0, min_weight=0.25)
    assert found.tolist() == pytest.approx([2.0, 1.0, ratio[2], 0.25])
    found = masked_importance_weight(new, sampler, max_weight=2.0, min_weight=0.25)
    assert found.tolist() == pytest.approx([0.0, 1.0, ratio[2], 0.0])
    # Responses of two tokens: the sums of their log-ratios are 1 and -3.
    bounds = torch.tensor([0, 2, 4])
    found = importance_weight(new, sampler, bounds, max_weight=2.0, min_weight=0.25)
    assert found.tolist() == [2.0, 2.0, 0.25, 0.25]
    found = masked_importance_weight(new, sampler, bounds, max_weight=3.0, min_weight=0.25)
    assert found.tolist() == pytest.approx([math.e, math.e, 0.0, 0.0])
    with pytest.raises(ValueError, match="expected 0 <= min_weight < max_weight, got 2"):
        importance_weight(new, sampler, max_weight=1.0, min_weight=2.0)


OLD = torch.tensor([-3.0, -2.0, -3.0, -2.5, -1.0], dtype=torch.float64)
# Ratios 2, 2, 0.5, 0.5, 5
RATIO = torch.tensor([2.0, 2.0, 0.5, 0.5, 5.0], dtype=torch.float64)
ADVANTAGE = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
BOUNDS = torch.tensor([0, 2, 5])


def test_two_bounds_and_a_dual_clip_by_hand() -> None:
    new = OLD + RATIO.log()
    found = ppo_clip(new, OLD, ADVANTAGE, clip_range=0.3, clip_range_high=0.5)
    assert found.tolist() == pytest.approx([-1.5, 2.0, -0.5, 0.7, 5.0])
    found = ppo_clip(new, OLD, ADVANTAGE, clip_range=0.3, clip_range_high=0.5, dual_clip=3.0)
    assert found.tolist() == pytest.approx([-1.5, 2.0, -0.5, 0.7, 3.0])
    leaf = new.requires_grad_()
    ppo_clip(
        leaf, OLD, ADVANTAGE, clip_range=0.3, clip_range_high=0.5, dual_clip=3.0
    ).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == pytest.approx([0.0, 2.0, -0.5, 0.0, 0.0])
    for options, message in (
        ({"clip_range_high": 0.0}, "clip_range_high: expected a positive number, got 0"),
        ({"dual_clip": 1.0}, "dual_clip: expected a number above 1, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ppo_clip(new, OLD, ADVANTAGE, **options)


def test_sequence_ratios_by_hand() -> None:
    new = (OLD + RATIO.log()).requires_grad_()
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    # The mean log-ratios are those of 2 and of (0.5 * 0.5 * 5)^(1/3).
    second = 1.25 ** (1 / 3)
    found = gspo_clip(new, OLD, advantage, BOUNDS, clip_range=0.2, clip_range_high=0.3)
    assert found.tolist() == pytest.approx([-1.3, -1.3, second, second, second])
    found.sum().backward()
    assert new.grad is not None
    # A third of each token's loss, from three tokens.
    assert new.grad.tolist() == pytest.approx([0.0, 0.0, second, second, second])


def test_clipped_weights_of_log_probs_by_hand() -> None:
    new = (OLD + RATIO.log()).requires_grad_()
    found = cispo(new, OLD, ADVANTAGE, max_ratio=3.0, min_ratio=1.0)
    weight = [2.0, 2.0, 1.0, 1.0, 3.0]
    expected = [
        -w * a * p for w, a, p in zip(weight, ADVANTAGE.tolist(), new.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected)
    found.sum().backward()
    assert new.grad is not None
    # No token loses its gradient.
    assert new.grad.tolist() == pytest.approx([-2.0, 2.0, -1.0, 1.0, 3.0])
    with pytest.raises(ValueError, match="expected 0 <= min_ratio < max_ratio, got 0"):
        cispo(new, OLD, ADVANTAGE, max_ratio=0.0)


@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo"])
def test_gradients_of_policy_losses_by_finite_differences(loss: str) -> None:
    generator = torch.Generator().manual_seed(1)
    leaf = (OLD + 0.5 * torch.randn(5, generator=generator, dtype=torch.float64)).requires_grad_()

    def clip(logprob: Tensor) -> Tensor:
        return ppo_clip(logprob, OLD, ADVANTAGE, clip_range_high=0.4, dual_clip=1.5)

    def gspo(logprob: Tensor) -> Tensor:
        return gspo_clip(logprob, OLD, ADVANTAGE, BOUNDS, clip_range=0.2)

    if loss != "cispo":  # whose weight is a constant of its gradient
        assert torch.autograd.gradcheck(clip if loss == "clip" else gspo, (leaf,))
        return
    (found,) = torch.autograd.grad(cispo(leaf, OLD, ADVANTAGE).sum(), leaf)
    weight = (leaf.detach() - OLD).exp().clamp(max=5.0)
    torch.testing.assert_close(found, -weight * ADVANTAGE)
