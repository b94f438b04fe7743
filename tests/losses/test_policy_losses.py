"""Advantages, whitening, the value loss and importance weights, by hand."""

import math

import pytest
import torch

from fastalign.losses import (
    grpo_advantage,
    importance_weight,
    rloo_advantage,
    value_clipped,
    whiten,
)

SCORES = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0], dtype=torch.float64)


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


@pytest.mark.parametrize("function", [rloo_advantage, grpo_advantage])
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
