"""Sums over responses, and the pairs made of them."""

from itertools import pairwise

import pytest
import torch

from fastalign.ops.preference_loss.pairs import PairLogprobs
from fastalign.ops.segments import segment_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bounds", [[0, 3, 3, 10], [0, 0, 10], [0, 10, 10], [0, 4, 10]])
def test_sums_of_slices(bounds: list[int], dtype: torch.dtype) -> None:
    values = torch.linspace(-1, 2.3, 10, dtype=dtype)
    result = segment_sum(values, torch.tensor(bounds))
    expected = torch.stack([values[a:b].double().sum() for a, b in pairwise(bounds)])
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected.to(dtype), rtol=0, atol=10 * torch.finfo(dtype).eps)


def test_nothing_at_all() -> None:
    assert segment_sum(torch.zeros(0), torch.tensor([0])).shape == (0,)
    assert segment_sum(torch.zeros(0), torch.tensor([0, 0, 0])).tolist() == [0.0, 0.0]


def test_gradient_by_finite_differences() -> None:
    values = torch.randn(7, dtype=torch.float64, requires_grad=True)
    bounds = torch.tensor([0, 2, 2, 7])
    assert torch.autograd.gradcheck(lambda v: segment_sum(v, bounds), values)


def test_gradient_spreads_to_the_segments_own_rows() -> None:
    values = torch.zeros(5, requires_grad=True)
    (segment_sum(values, torch.tensor([0, 2, 5])) * torch.tensor([2.0, -1.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [2.0, 2.0, -1.0, -1.0, -1.0]


def test_a_long_response_is_rounded_once() -> None:
    values = torch.full((100_000,), -0.1)
    result = segment_sum(values, torch.tensor([0, 100_000]))
    assert result.item() == values.double().sum().float().item()


def test_a_nan_stays_in_its_segment() -> None:
    values = torch.tensor([1.0, float("nan"), 3.0])
    result = segment_sum(values, torch.tensor([0, 1, 2, 3]))
    assert result[[0, 2]].tolist() == [1.0, 3.0]
    assert result[1].isnan()


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 3, 2, 4], "expected to rise from 0 to 4"),
        ([0, 3], "got 0..3"),
        ([1, 4], "got 1..4"),
        ([], r"expected integers \(R \+ 1,\)"),
    ],
)
def test_bad_bounds_are_refused(bounds: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segment_sum(torch.zeros(4), torch.tensor(bounds, dtype=torch.int64))


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="values: expected floating"):
        segment_sum(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 4]))


def pairs(reference: torch.Tensor | None) -> PairLogprobs:
    policy = torch.tensor([-10.0, -12.0, -1.0, -2.0], requires_grad=True)
    return PairLogprobs.from_responses(policy, reference, torch.tensor([5, 4, 1, 2]))


def test_responses_alternate_between_chosen_and_rejected() -> None:
    made = pairs(torch.tensor([-11.0, -11.5, -3.0, -4.0]))
    assert made.policy_chosen_logprob.tolist() == [-10.0, -1.0]
    assert made.chosen_length.tolist() == [5, 1]
    assert made.rejected_length.tolist() == [4, 2]
    assert made.tie.tolist() == [False, False]
    assert [value[0].item() for value in made.logprobs()] == [-10.0, -12.0, -11.0, -11.5]


def test_implicit_rewards_by_hand() -> None:
    made = pairs(torch.tensor([-11.0, -11.5, -3.0, -4.0]))
    chosen, rejected = made.implicit_rewards(0.1)
    assert chosen.tolist() == pytest.approx([0.1, 0.2])
    assert rejected.tolist() == pytest.approx([-0.05, 0.2])
    assert not chosen.requires_grad


def test_without_a_reference_the_reward_is_the_policys_own() -> None:
    chosen, _ = pairs(None).implicit_rewards(0.1)
    assert chosen.tolist() == pytest.approx([-1.0, -0.1])
    with pytest.raises(ValueError, match="reference_logprob: expected one"):
        pairs(None).logprobs()
