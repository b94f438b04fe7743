"""The drop-in preference loss with a formula against the same loss as a function of pairs."""

import pytest
import torch
from torch import Tensor

from fastalign.fused import fused_linear_preference_loss
from fastalign.losses import dpo, formula
from fastalign.losses.chunk_losses import preference_loss_fn
from fastalign.ops import fused_linear_loss
from fastalign.ops.preference_loss.pairs import PairLogprobs
from tests.fused.fused_cases import (
    BOUNDS,
    NUM_PAIRS,
    Metrics,
    assert_same,
    leaves,
    reference_logprob,
    some_targets,
)
from tests.ops.preference_loss_cases import FORMULAS, make

TIE = torch.tensor([False, True, False])


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_gives_what_its_function_gives(
    name: str, dtype: torch.dtype, gathered: bool
) -> None:
    made, reference = make(name), reference_logprob(dtype)

    def pair_loss(pairs: PairLogprobs) -> Tensor:
        return made(pairs)

    def everything(loss: object) -> Metrics:
        values = hidden, weight, bias = leaves(dtype)
        if gathered:
            found, metrics = fused_linear_preference_loss(
                hidden, weight, some_targets(), BOUNDS, loss, reference, tie=TIE, bias=bias
            )
        else:
            loss_fn = preference_loss_fn(loss, BOUNDS, reference, normaliser=NUM_PAIRS, tie=TIE)
            found, metrics = fused_linear_loss(
                hidden, weight, some_targets(), BOUNDS[::2], loss_fn, bias=bias
            )
        gradients = torch.autograd.grad(found, values)
        return {"loss": found.detach(), **metrics, **dict(zip("hwb", gradients, strict=True))}

    assert_same(everything(made), everything(pair_loss), dtype)


def test_a_formula_has_no_place_for_a_margin() -> None:
    with pytest.raises(ValueError, match="margin: expected None, for the formula dpo takes none"):
        preference_loss_fn(
            formula(dpo), BOUNDS, torch.zeros(6), normaliser=3, margin=torch.zeros(3)
        )


def test_a_bare_function_of_log_probs_is_named() -> None:
    hidden, weight, _ = leaves(torch.float32)
    with pytest.raises(ValueError, match=r"pair_loss: .* formula\(dpo\), got dpo"):
        fused_linear_preference_loss(hidden, weight, some_targets(), BOUNDS, dpo, torch.zeros(6))
