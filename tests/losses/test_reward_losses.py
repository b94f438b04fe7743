"""Bradley-Terry and its extensions to ties."""

import math

import pytest
import torch

from fastalign import losses

MODELS = [("rao_kupper", 3.0), ("rao_kupper", 1.2), ("davidson", 1.0), ("davidson", 0.3)]


def rewards(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, size, generator=generator, dtype=torch.float64)
    return values[0].requires_grad_(), values[1].requires_grad_()


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = torch.tensor([2.0]), torch.tensor([1.0])
    # softplus(-1), then softplus(-(1 - 0.5)), then + 0.01 * (2 + 1)^2
    assert losses.bradley_terry(chosen, rejected).item() == pytest.approx(0.3132616875)
    with_margin = losses.bradley_terry(chosen, rejected, margin=torch.tensor([0.5]))
    assert with_margin.item() == pytest.approx(0.4740769842)
    centred = losses.bradley_terry(chosen, rejected, centring_coefficient=0.01)
    assert centred.item() == pytest.approx(0.3132616875 + 0.09)


def test_bradley_terrys_gradient_in_closed_form() -> None:
    chosen, rejected = rewards()
    margin = torch.linspace(-1, 1, 6, dtype=torch.float64)
    losses.bradley_terry(chosen, rejected, margin=margin).sum().backward()
    d = (chosen - rejected - margin).detach()
    expected = -(1 - 1 / (1 + (-d).exp()))
    torch.testing.assert_close(chosen.grad, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(rejected.grad, -expected, rtol=1e-12, atol=0)


def test_gradients_by_finite_differences() -> None:
    chosen, rejected = rewards()
    margin = torch.full((6,), 0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda c, r: losses.bradley_terry(c, r, margin=margin, centring_coefficient=0.1),
        (chosen, rejected),
    )


@pytest.mark.parametrize(("name", "nu"), MODELS)
def test_gradients_of_ties_by_finite_differences(name: str, nu: float) -> None:
    tie = torch.arange(6) % 2 == 0
    assert torch.autograd.gradcheck(lambda d: getattr(losses, name)(d, tie, nu=nu), rewards()[0])


def test_a_constant_added_to_every_reward_changes_nothing() -> None:
    chosen, rejected = rewards()
    shifted = losses.bradley_terry(chosen + 7.5, rejected + 7.5)
    torch.testing.assert_close(shifted, losses.bradley_terry(chosen, rejected))


def test_centring_pulls_the_constant_to_zero() -> None:
    chosen, rejected = rewards()
    near = losses.bradley_terry(chosen, rejected, centring_coefficient=0.1).sum()
    far = losses.bradley_terry(chosen + 5, rejected + 5, centring_coefficient=0.1).sum()
    assert far > near


@pytest.mark.parametrize(("name", "nu"), MODELS)
def test_win_loss_and_tie_probabilities_add_up_to_one(name: str, nu: float) -> None:
    difference = torch.linspace(-30, 30, 41, dtype=torch.float64)
    function = getattr(losses, name)
    never, always = torch.zeros(41, dtype=torch.bool), torch.ones(41, dtype=torch.bool)
    win, lose = function(difference, never, nu=nu), function(-difference, never, nu=nu)
    total = (-win).exp() + (-lose).exp() + (-function(difference, always, nu=nu)).exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "nu"), [("rao_kupper", 3.0), ("davidson", 1.0)])
def test_equal_rewards_tie_with_one_half(name: str, nu: float) -> None:
    loss = getattr(losses, name)(torch.zeros(1), torch.ones(1, dtype=torch.bool), nu=nu)
    assert loss.item() == pytest.approx(math.log(2))


def test_without_ties_both_models_become_bradley_terry() -> None:
    chosen, rejected = rewards()
    never = torch.zeros(6, dtype=torch.bool)
    plain = losses.bradley_terry(chosen, rejected)
    torch.testing.assert_close(losses.rao_kupper(chosen - rejected, never, nu=1 + 1e-12), plain)
    torch.testing.assert_close(losses.davidson(chosen - rejected, never, nu=1e-12), plain)


@pytest.mark.parametrize(("name", "nu"), [("rao_kupper", 1.0), ("davidson", 0.0)])
def test_a_nu_out_of_range_is_refused(name: str, nu: float) -> None:
    with pytest.raises(ValueError, match="nu: expected a"):
        getattr(losses, name)(torch.zeros(1), torch.ones(1, dtype=torch.bool), nu=nu)


def test_differing_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"margin: expected \(2,\) as chosen_reward has"):
        losses.bradley_terry(torch.zeros(2), torch.zeros(2), margin=torch.zeros(3))
    with pytest.raises(ValueError, match=r"tie: expected \(2,\)"):
        losses.davidson(torch.zeros(2), torch.zeros(1, dtype=torch.bool), nu=1.0)


def test_sft_is_the_negative_logprob() -> None:
    assert losses.negative_logprob(torch.tensor([-2.0, -0.5])).tolist() == [2.0, 0.5]
