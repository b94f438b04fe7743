"""Hand-worked numbers, gradients and properties of the preference losses."""

import inspect
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fastalign import losses
from fastalign.losses.preference import log_odds

NUMBERS = {
    "policy_chosen_logprob": -10.0,
    "policy_rejected_logprob": -12.0,
    "reference_chosen_logprob": -11.0,
    "reference_rejected_logprob": -11.5,
    "chosen_length": 5,
    "rejected_length": 4,
}
# h = 1.5; beta * h = 0.15 unless said otherwise
GOLDEN: list[tuple[str, dict[str, float], float]] = [
    ("dpo", {"beta": 0.1}, 0.6209570478),
    ("dpo_label_smoothed", {"beta": 0.1, "label_smoothing": 0.1}, 0.6359570478),
    ("dpo_robust", {"beta": 0.1, "label_smoothing": 0.1}, 0.6022070478),
    ("hinge", {"beta": 0.1}, 0.85),
    ("ipo_sum", {"beta": 0.1}, 12.25),
    ("ipo_mean", {"beta": 0.1}, 21.855625),
    # mean log-ratios 1/5 and -0.5/4: softplus(-5 * 0.325)
    ("dpo_length_normalised", {"beta": 5.0}, 0.1797446354),
    # one token longer: softplus(-(0.15 + 0.01))
    ("dpo_length_penalised", {"beta": 0.1, "alpha": 0.01}, 0.6163437730),
    # per token -2 and -3: softplus(-(2 * 1 - 0.5))
    ("simpo", {"beta": 2.0, "gamma": 0.5}, 0.2014132780),
    # 2 + 0.1 * softplus(-(log odds(e^-2) - log odds(e^-3)))
    ("orpo", {"beta": 0.1}, 2.0288750784),
    # 0.9 * softplus(-1.5) + 0.1 * softplus(1.5)
    ("simpo", {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.1}, 0.3514132780),
    # softplus(-0.1 * 2) + 0.7 * 10 / 5
    ("cpo", {"beta": 0.1, "nll_coefficient": 0.7}, 1.9981388694),
    # log-ratios 1 and -0.5: 1 - sigmoid(0.1) + sigmoid(-0.05)
    ("apo_zero", {"beta": 0.1}, 0.9625234160),
    # sigmoid(0.1) + 1 - sigmoid(0.15)
    ("apo_down", {"beta": 0.1}, 0.9875493421),
    # softplus(-0.1 * (e^0.5 - e^-1))
    ("dpo_forward_kl", {"beta": 0.1}, 0.6311543836),
    # softplus(-0.1 * (log(2 e / (1 + e)) - log(2 e^-0.5 / (1 + e^-0.5))))
    ("dpo_jensen_shannon", {"beta": 0.1}, 0.6606521625),
    # softplus(-0.1 * (e^0.15 - e^-0.3) / 0.3)
    ("dpo_alpha_divergence", {"beta": 0.1, "alpha": 0.3}, 0.6254376939),
]
GOLDEN_IDS = ["-".join([name, *options]) for name, options, _ in GOLDEN]
TIES = [
    ("dpo_rao_kupper", 3.0, 1.2759559008, 0.6973649394),
    ("dpo_davidson", 1.0, 1.3127002816, 0.6945531011),
]
ALL = [*dict.fromkeys(name for name, _, _ in GOLDEN), *(name for name, *_ in TIES)]


def arguments(
    function: Callable[..., Tensor], size: int = 1, seed: int | None = None
) -> list[Tensor]:
    """What `function` takes by position: the numbers above, or random ones."""
    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    generator = torch.Generator().manual_seed(seed or 0)
    values = []
    for name in names:
        if name == "tie":
            values.append(torch.arange(size) % 2 == 1)
        elif name.endswith("length"):
            value = torch.randint(1, 9, (size,), generator=generator)
            values.append(value if seed is not None else torch.full((size,), int(NUMBERS[name])))
        elif seed is None:
            values.append(torch.full((size,), NUMBERS[name], dtype=torch.float64))
        else:
            values.append(-torch.rand(size, generator=generator, dtype=torch.float64) * 9 - 0.1)
    return values


@pytest.mark.parametrize(
    ("name", "options", "expected"), GOLDEN, ids=["-".join([g[0], *g[1]]) for g in GOLDEN]
)
def test_hand_worked_numbers(name: str, options: dict[str, float], expected: float) -> None:
    function = getattr(losses, name)
    result = function(*arguments(function), **options)
    assert result.shape == (1,)
    assert result.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("name", "nu", "win", "tie"), TIES)
def test_hand_worked_numbers_of_ties(name: str, nu: float, win: float, tie: float) -> None:
    function = getattr(losses, name)
    result = function(*arguments(function, size=2), beta=0.1, nu=nu)
    assert result.tolist() == pytest.approx([win, tie], abs=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_gradients_by_finite_differences(name: str) -> None:
    function = getattr(losses, name)
    values = arguments(function, size=6, seed=3)
    leaves = [v.requires_grad_() if v.is_floating_point() else v for v in values]
    assert torch.autograd.gradcheck(partial(function, beta=0.3), leaves)


@pytest.mark.parametrize("name", ALL)
def test_each_pair_is_alone(name: str) -> None:
    function = getattr(losses, name)
    values = arguments(function, size=6, seed=4)
    together = function(*values)
    apart = torch.cat([function(*(value[i : i + 1] for value in values)) for i in range(6)])
    torch.testing.assert_close(together, apart, rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_float32_stays_float32_and_empty_stays_empty(name: str) -> None:
    function = getattr(losses, name)
    floats = [
        v.float() if v.is_floating_point() else v for v in arguments(function, size=3, seed=1)
    ]
    assert function(*floats).dtype == torch.float32
    assert function(*(v[:0] for v in floats)).shape == (0,)


@pytest.mark.parametrize("name", ALL)
def test_differing_shapes_are_refused_by_name(name: str) -> None:
    function = getattr(losses, name)
    values = arguments(function, size=4, seed=1)
    with pytest.raises(ValueError, match=r"expected \(4,\) as .* has, got \(3,\)"):
        function(values[0], values[1][:3], *values[2:])


@pytest.mark.parametrize("name", ALL)
def test_a_beta_that_is_not_positive_is_refused(name: str) -> None:
    function = getattr(losses, name)
    with pytest.raises(ValueError, match="beta: expected a positive number, got 0"):
        function(*arguments(function, seed=1), beta=0.0)


@pytest.mark.parametrize("name", ["dpo_label_smoothed", "dpo_robust", "simpo"])
@pytest.mark.parametrize("smoothing", [-0.1, 0.5, math.nan])
def test_a_smoothing_without_meaning_is_refused(name: str, smoothing: float) -> None:
    function = getattr(losses, name)
    with pytest.raises(ValueError, match=r"label_smoothing: expected 0 <= .* < 0\.5"):
        function(*arguments(function, seed=1), label_smoothing=smoothing)


def test_a_negative_length_penalty_is_refused() -> None:
    values = arguments(losses.dpo_length_penalised, seed=1)
    with pytest.raises(ValueError, match="alpha: expected a number not below 0, got -1"):
        losses.dpo_length_penalised(*values, alpha=-1.0)


@pytest.mark.parametrize("alpha", [0.0, 1.0, math.nan])
def test_an_alpha_that_is_no_divergence_is_refused(alpha: float) -> None:
    values = arguments(losses.dpo_alpha_divergence, seed=1)
    with pytest.raises(ValueError, match=r"alpha: expected a number in \(0, 1\), got"):
        losses.dpo_alpha_divergence(*values, alpha=alpha)


def test_an_alpha_divergence_lies_between_the_two_directions_of_the_kl() -> None:
    values = arguments(losses.dpo, size=5, seed=2)
    for alpha, limit in ((1e-7, losses.dpo), (1 - 1e-7, losses.dpo_forward_kl)):
        found = losses.dpo_alpha_divergence(*values, alpha=alpha)
        torch.testing.assert_close(found, limit(*values), rtol=1e-4, atol=1e-6)


def test_what_the_anchored_losses_push() -> None:
    chosen, rejected = (torch.tensor([-3.0], requires_grad=True) for _ in range(2))
    reference = torch.tensor([-3.0])
    for function, signs in ((losses.apo_zero, (-1, 1)), (losses.apo_down, (0, 1))):
        loss = function(chosen, rejected, reference, reference).sum()
        of_chosen, of_rejected = torch.autograd.grad(loss, (chosen, rejected))
        assert (of_chosen.sign().item(), of_rejected.sign().item()) == signs
    # At equal odds the two forces on the chosen response cancel; once it is likelier it is lowered.
    likelier = torch.tensor([0.0], requires_grad=True)
    loss = losses.apo_down(likelier, torch.tensor([-8.0]), reference, reference).sum()
    assert torch.autograd.grad(loss, likelier)[0] > 0


def test_policy_equal_to_reference_gives_ln_2() -> None:
    chosen, rejected = torch.tensor([-300.0, -4.0]), torch.tensor([-250.0, -7.0])
    loss = losses.dpo(chosen, rejected, chosen, rejected)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)


def test_smoothing_of_zero_is_dpo() -> None:
    values = arguments(losses.dpo, size=5, seed=2)
    expected = losses.dpo(*values)
    for function in (losses.dpo_label_smoothed, losses.dpo_robust):
        torch.testing.assert_close(function(*values, label_smoothing=0.0), expected)


def test_robust_dpo_is_unbiased_under_flipped_labels() -> None:
    # E over labels flipped with probability e of the robust loss is the loss on the true labels
    e = 0.2
    chosen, rejected, ref_chosen, ref_rejected = arguments(losses.dpo, size=5, seed=2)
    right = losses.dpo_robust(chosen, rejected, ref_chosen, ref_rejected, label_smoothing=e)
    flipped = losses.dpo_robust(rejected, chosen, ref_rejected, ref_chosen, label_smoothing=e)
    clean = losses.dpo(chosen, rejected, ref_chosen, ref_rejected)
    torch.testing.assert_close((1 - e) * right + e * flipped, clean)


def test_a_longer_chosen_answer_is_learnt_less_under_a_length_penalty() -> None:
    values = arguments(losses.dpo)
    shorter, longer = (
        losses.dpo_length_penalised(*values, torch.tensor([n]), torch.tensor([5]), alpha=0.1)
        for n in (4, 6)
    )
    assert longer < losses.dpo(*values) < shorter


def test_extreme_margins_stay_finite() -> None:
    zero = torch.zeros(2)
    far = torch.tensor([1e5, -1e5], requires_grad=True)
    plain = ("dpo", "dpo_label_smoothed", "dpo_robust", "hinge", "apo_zero", "apo_down")
    divergences = ("dpo_forward_kl", "dpo_jensen_shannon", "dpo_alpha_divergence")
    for name in (*plain, *divergences):
        loss = getattr(losses, name)(far, zero, zero, zero)
        (grad,) = torch.autograd.grad(loss.sum(), far)
        assert loss.isfinite().all()
        assert grad.isfinite().all()
    for name in ("dpo_rao_kupper", "dpo_davidson"):
        for tie in (False, True):
            loss = getattr(losses, name)(far, zero, zero, zero, torch.tensor([tie, tie]))
            (grad,) = torch.autograd.grad(loss.sum(), far)
            assert loss.isfinite().all()
            assert grad.isfinite().all()


def test_log_odds_over_the_whole_range() -> None:
    values = torch.tensor([-1e4, -50.0, -1.0, -0.6932, -0.6931, -1e-3, -1e-12], dtype=torch.float64)
    values.requires_grad_()
    result = log_odds(values)
    expected = [x - math.log(-math.expm1(x)) for x in values.tolist()]
    assert result.tolist() == pytest.approx(expected, rel=1e-12)
    (grad,) = torch.autograd.grad(result.sum(), values)
    # d log odds / d log p = 1 / (1 - p)
    assert grad.tolist() == pytest.approx([-1 / math.expm1(x) for x in values.tolist()], rel=1e-9)


def test_log_odds_of_certainty_is_finite() -> None:
    certain = torch.zeros(1, requires_grad=True)
    result = log_odds(certain)
    result.backward()
    assert result.isfinite()
    assert certain.grad is not None
    assert certain.grad.isfinite().all()
