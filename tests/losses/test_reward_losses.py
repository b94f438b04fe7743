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


# Of difference 0.15: nu = 3 and nu = 1 tie equal responses with one half.
VOTES = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)


def test_vote_shares_by_hand() -> None:
    chosen = torch.tensor([2.0], dtype=torch.float64)
    rejected = torch.tensor([1.0], dtype=torch.float64)
    # softplus(-1) = 0.3132616875 and softplus(1) = 1.3132616875; 0.5 + 0.2 / 2 for the first
    plain = losses.bradley_terry_votes(chosen, rejected, VOTES)
    assert plain.item() == pytest.approx(0.6 * 0.3132616875 + 0.4 * 1.3132616875)
    # softplus(-(1 - 0.5)) = 0.4740769842, softplus(0.5) = 0.9740769842; 0.01 * (2 + 1)^2
    margin = torch.tensor([0.5], dtype=torch.float64)
    centred = losses.bradley_terry_votes(
        chosen, rejected, VOTES, margin=margin, centring_coefficient=0.01
    )
    assert centred.item() == pytest.approx(0.6 * 0.4740769842 + 0.4 * 0.9740769842 + 0.09)
    difference = torch.tensor([0.15], dtype=torch.float64)
    # -log of win, loss and tie: 1.2759559008, 1.5008505803, 0.6973649394
    rao_kupper = losses.rao_kupper_votes(difference, VOTES, nu=3.0)
    assert rao_kupper.item() == pytest.approx(1.2277061124, rel=1e-9)
    # 1.3127002816, 1.4627002816, 0.6945531011
    davidson = losses.davidson_votes(difference, VOTES, nu=1.0)
    assert davidson.item() == pytest.approx(1.2340708455, rel=1e-9)


def random_shares(size: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, 3, generator=generator, dtype=torch.float64).softmax(-1)


def test_votes_that_agree_are_a_label() -> None:
    chosen, rejected = rewards()
    tie = torch.arange(6) % 2 == 0
    first, ties = (
        torch.eye(3, dtype=torch.float64)[[0] * 6],
        torch.eye(3, dtype=torch.float64)[[2 if t else 0 for t in tie.tolist()]],
    )
    plain = losses.bradley_terry_votes(chosen, rejected, first)
    torch.testing.assert_close(plain, losses.bradley_terry(chosen, rejected))
    for name, nu in MODELS:
        found = getattr(losses, f"{name}_votes")(chosen - rejected, ties, nu=nu)
        torch.testing.assert_close(found, getattr(losses, name)(chosen - rejected, tie, nu=nu))


@pytest.mark.parametrize(("name", "nu"), MODELS)
def test_votes_change_sides_with_the_responses_and_a_constant_changes_nothing(
    name: str, nu: float
) -> None:
    chosen, rejected = rewards()
    shares = random_shares()
    swapped = shares[:, [1, 0, 2]]
    function = getattr(losses, f"{name}_votes")
    value = function(chosen - rejected, shares, nu=nu)
    torch.testing.assert_close(function(rejected - chosen, swapped, nu=nu), value)
    plain = losses.bradley_terry_votes(chosen, rejected, shares)
    torch.testing.assert_close(losses.bradley_terry_votes(rejected, chosen, swapped), plain)
    shifted = losses.bradley_terry_votes(chosen + 7.5, rejected + 7.5, shares)
    torch.testing.assert_close(shifted, plain)
    assert torch.autograd.gradcheck(lambda d: function(d, shares, nu=nu), chosen)
    assert torch.autograd.gradcheck(
        lambda c, r: losses.bradley_terry_votes(c, r, shares, centring_coefficient=0.1),
        (chosen, rejected),
    )


@pytest.mark.parametrize(("name", "nu"), MODELS)
def test_the_cross_entropy_is_least_where_the_probabilities_are_the_shares(
    name: str, nu: float
) -> None:
    difference = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    parameter = torch.tensor(nu, dtype=torch.float64, requires_grad=True)
    outcomes = getattr(losses, f"{name}_outcomes")(difference, nu=parameter)
    loss = getattr(losses, f"{name}_votes")(difference, outcomes.exp().detach(), nu=parameter)
    for gradient in torch.autograd.grad(loss.sum(), (difference, parameter)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    entropy = -(outcomes.exp() * outcomes).sum(-1)
    torch.testing.assert_close(loss, entropy)


def test_shares_of_another_shape_are_refused() -> None:
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match=r"shares: expected \(2, 3\), got \(2, 2\)"):
        losses.bradley_terry_votes(zeros, zeros, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"shares: expected \(2, 3\), got \(3, 3\)"):
        losses.davidson_votes(zeros, torch.zeros(3, 3), nu=1.0)
