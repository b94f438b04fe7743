"""`formula`: a function of `losses` with its parameters."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated

import pytest
import torch
from torch import Tensor

from fastalign import fused_linear_preference_loss, losses
from fastalign.losses import formula, formulas
from fastalign.ops import PreferenceFormula, preference_loss
from fastalign.ops.preference_loss.pairs import PairLogprobs
from fastalign.trainers import LOSSES
from fastalign.trainers.dpo.config import NLL_HELP, loss_dataclass
from tests.ops.preference_loss_cases import FORMULAS, WITH_TIES, make


def test_it_is_called_on_pairs_and_gives_the_functions_losses() -> None:
    pairs = PairLogprobs.from_responses(
        torch.tensor([-10.0, -12.0, -4.0, -3.0]),
        torch.tensor([-11.0, -11.5, -3.0, -4.0]),
        torch.tensor([5, 4, 2, 3]),
        torch.tensor([False, True]),
    )
    found = formula(losses.dpo_davidson, beta=0.3, nu=2.0)(pairs)
    expected = losses.dpo_davidson(*pairs.logprobs(), pairs.tie, beta=0.3, nu=2.0)
    assert torch.equal(found, expected)
    found = formula(losses.simpo)(pairs)
    lengths = (pairs.chosen_length, pairs.rejected_length)
    assert torch.equal(found, losses.simpo(*pairs.logprobs()[:2], *lengths))


@pytest.mark.parametrize("name", FORMULAS)
def test_what_it_needs_is_known(name: str) -> None:
    made = make(name)
    assert made.name == name
    assert made.needs_reference == (name not in ("simpo", "orpo", "cpo"))
    assert made.uses_ties == (name in WITH_TIES)
    pairs = PairLogprobs.from_responses(torch.zeros(2), None, torch.ones(2).long())
    if made.needs_reference:
        with pytest.raises(ValueError, match="reference_logprob: expected one"):
            made(pairs)


def test_parameters_have_the_functions_defaults() -> None:
    assert formula(losses.orpo).parameters == {"beta": 0.1}
    found = formula(losses.simpo, gamma=0.5).parameters
    assert found == {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.0}
    assert formula(losses.dpo) == formula(losses.dpo, beta=0.1)


def test_a_smoothed_margin_is_refused_by_name_where_a_kernel_is_asked_for() -> None:
    made = formula(losses.simpo, label_smoothing=0.1)
    assert formula(losses.simpo).kernel is not None
    assert made.kernel is None
    with pytest.raises(ValueError, match="no kernel computes simpo, got 'triton'"):
        preference_loss(torch.zeros(4), torch.tensor([0, 2, 4]), made, backend="triton")


def make_with(loss: object, parameters: dict[str, float]) -> PreferenceFormula:
    return formula(loss, **parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "parameters", "message"),
    [
        (losses.bradley_terry, {}, "loss: expected one of dpo, .* got 'bradley_terry'"),
        (
            "dpo",
            {},
            "loss: expected one of dpo, .*dpo_alpha_divergence of fastalign.losses, got 'dpo'",
        ),
        (losses.dpo, {"gamma": 1.0}, r"gamma: expected a parameter of dpo \(beta\), got gamma=1.0"),
        (losses.dpo, {"tie": 1.0}, r"tie: expected a parameter of dpo"),
        (losses.orpo, {"beta": 0.0}, "beta: expected a positive number, got 0"),
        (losses.ipo_sum, {"beta": 0.0}, "beta: expected a positive number, got 0"),
        (losses.dpo_robust, {"label_smoothing": 0.5}, "label_smoothing: expected 0 <="),
        (losses.dpo_length_penalised, {"alpha": -1.0}, "alpha: expected a number not below 0"),
        (losses.dpo_rao_kupper, {"nu": 1.0}, "nu: expected a number above 1"),
        (losses.dpo_davidson, {"nu": math.nan}, "nu: expected a positive number"),
        (losses.dpo, {"nll_coefficient": -1.0}, "nll_coefficient: expected a finite number not"),
        (losses.cpo, {"nll_coefficient": math.inf}, "nll_coefficient: expected a finite number"),
    ],
)
def test_what_cannot_be_is_refused(
    loss: object, parameters: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_with(loss, parameters)


@pytest.fixture
def exponential(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """A loss that no kernel computes: a function and its registration."""
    monkeypatch.setattr(formulas, "_LOSSES", dict(formulas._LOSSES))

    @formulas.pair_loss()
    def exponential(
        policy_chosen_logprob: Tensor,
        policy_rejected_logprob: Tensor,
        *,
        beta: Annotated[float, "Scale of the log-probs."] = 0.5,
    ) -> Tensor:
        """Exponential loss, AdaBoost's.

        Return exp(-beta * (log pi(c) - log pi(r))).
        """
        return (-beta * (policy_chosen_logprob - policy_rejected_logprob)).exp()

    return exponential


def test_a_loss_without_a_kernel_is_computed_by_its_function(
    exponential: Callable[..., Tensor],
) -> None:
    assert list(formulas.pair_losses())[-1] == "exponential"
    made = formula(exponential, beta=0.25)
    assert made.kernel is None
    assert (made.needs_reference, made.uses_ties) == (False, False)
    logprob = (-torch.rand(8, generator=torch.Generator().manual_seed(0))).requires_grad_()
    found, sums = preference_loss(logprob, torch.tensor([0, 1, 3, 6, 8]), made)
    assert torch.equal(found, exponential(sums[0::2], sums[1::2], beta=0.25))
    found.sum().backward()
    assert logprob.grad is not None
    assert (logprob.grad[0] < 0) & (logprob.grad[1] > 0)
    with pytest.raises(ValueError, match="no kernel computes exponential, got 'triton'"):
        preference_loss(logprob, torch.tensor([0, 1, 3, 6, 8]), made, backend="triton")


def test_a_loss_without_a_kernel_goes_through_the_fused_head(
    exponential: Callable[..., Tensor],
) -> None:
    def run(pair_loss: Callable[[PairLogprobs], Tensor]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(9, 4, generator=generator).requires_grad_()
        weight = torch.randn(11, 4, generator=generator).requires_grad_()
        loss, _ = fused_linear_preference_loss(
            hidden, weight, torch.arange(9), [0, 2, 5, 7, 9], pair_loss
        )
        return [loss, *torch.autograd.grad(loss, (hidden, weight))]

    made = formula(exponential)
    by_function = run(lambda pairs: made(pairs))
    assert all(torch.equal(a, b) for a, b in zip(run(made), by_function, strict=True))


def test_a_losss_dataclass_has_its_functions_parameters(
    exponential: Callable[..., Tensor],
) -> None:
    made = loss_dataclass(exponential)
    assert made().beta == 0.5  # type: ignore[call-arg]
    assert made.__doc__ == "Exponential loss, AdaBoost's."
    assert [field.metadata["help"] for field in fields(made)] == [
        "Scale of the log-probs.",
        NLL_HELP,
    ]
    assert made(beta=0.25).formula() == formula(exponential, beta=0.25)
    assert [name for name in LOSSES if LOSSES[name]().name != name] == []  # type: ignore[call-arg]
