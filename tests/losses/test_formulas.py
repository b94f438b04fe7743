"""`formula`: a function of `losses` with its parameters."""

import math

import pytest
import torch

from fastalign import losses
from fastalign.losses import formula
from fastalign.ops import PreferenceFormula
from fastalign.ops.preference_loss.pairs import PairLogprobs
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
    assert made.needs_reference == (name not in ("simpo", "orpo"))
    assert made.uses_ties == (name in WITH_TIES)
    pairs = PairLogprobs.from_responses(torch.zeros(2), None, torch.ones(2).long())
    if made.needs_reference:
        with pytest.raises(ValueError, match="reference_logprob: expected one"):
            made(pairs)


def test_parameters_have_the_functions_defaults() -> None:
    assert formula(losses.simpo, gamma=0.5).parameters == {"beta": 2.0, "gamma": 0.5}
    assert formula(losses.dpo) == formula(losses.dpo, beta=0.1)


def make_with(loss: object, parameters: dict[str, float]) -> PreferenceFormula:
    return formula(loss, **parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "parameters", "message"),
    [
        (losses.bradley_terry, {}, "loss: expected one of dpo, .* got 'bradley_terry'"),
        ("dpo", {}, "loss: expected one of dpo, .*dpo_davidson of fastalign.losses, got 'dpo'"),
        (losses.dpo, {"gamma": 1.0}, r"gamma: expected a parameter of dpo \(beta\), got gamma=1.0"),
        (losses.dpo, {"tie": 1.0}, r"tie: expected a parameter of dpo"),
        (losses.orpo, {"beta": 0.0}, "beta: expected a positive number, got 0"),
        (losses.ipo_sum, {"beta": 0.0}, "beta: expected a positive number, got 0"),
        (losses.dpo_robust, {"label_smoothing": 0.5}, "label_smoothing: expected 0 <="),
        (losses.dpo_length_penalised, {"alpha": -1.0}, "alpha: expected a number not below 0"),
        (losses.dpo_rao_kupper, {"nu": 1.0}, "nu: expected a number above 1"),
        (losses.dpo_davidson, {"nu": math.nan}, "nu: expected a positive number"),
    ],
)
def test_what_cannot_be_is_refused(
    loss: object, parameters: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_with(loss, parameters)
