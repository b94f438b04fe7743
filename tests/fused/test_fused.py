"""The drop-in losses against eager lines."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastalign.fused import fused_linear_dpo_loss, fused_linear_preference_loss
from fastalign.ops.preference_loss.pairs import PairLogprobs
from tests.fused.fused_cases import (
    BETA,
    BOUNDS,
    NUM_PAIRS,
    NUM_ROWS,
    Call,
    assert_same,
    eager_dpo,
    eager_sft,
    eager_tokens,
    everything,
    fused_dpo,
    fused_preference,
    fused_sft,
    leaves,
    reference_logprob,
    some_targets,
)


@pytest.mark.parametrize("budget", [1_000, 6_000, None])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("fused", "eager"),
    [(fused_dpo, eager_dpo), (fused_preference, eager_dpo), (fused_sft, eager_sft)],
)
def test_loss_gradients_and_metrics(
    fused: Call, eager: Call, dtype: torch.dtype, with_bias: bool, budget: int | None
) -> None:
    found = everything(fused, dtype, with_bias, max_buffer_bytes=budget)
    assert_same(found, everything(eager, dtype, with_bias), dtype)
    assert found["loss"].dtype == dtype


@pytest.mark.parametrize("fused", [fused_dpo, fused_sft])
def test_options_reach_the_head(fused: Call) -> None:
    rows = torch.linspace(0.5, 2.0, NUM_ROWS, dtype=torch.float64)
    options = {"temperature": rows, "softcap": 2.0, "logit_scale": 0.5}
    found = everything(fused, torch.float64, True, **options)
    hidden, weight, bias = values = leaves(torch.float64)
    logits = 2.0 * torch.tanh(torch.nn.functional.linear(hidden, weight, bias) * 0.5 / 2.0)
    logprob = -torch.nn.functional.cross_entropy(
        logits / rows[:, None], some_targets(), reduction="none"
    )
    if fused is fused_sft:
        loss = -logprob.sum() / (some_targets() != -100).sum()
    else:
        sums = torch.stack([logprob[start:stop].sum() for start, stop in pairwise(BOUNDS)])
        rewards = BETA * (sums - reference_logprob(torch.float64))
        loss = -torch.nn.functional.logsigmoid(rewards[0::2] - rewards[1::2]).mean()
    expected = dict(zip("hwb", torch.autograd.grad(loss, values), strict=True))
    expected["loss"] = loss.detach()
    assert_same({name: found[name] for name in expected}, expected, torch.float64)
    plain = everything(fused, torch.float64, True)
    for name in options:
        one = everything(fused, torch.float64, True, **{name: options[name]})
        assert abs(one["loss"] - plain["loss"]) > 1e-3


@pytest.mark.parametrize("fused", [fused_dpo, fused_preference, fused_sft])
def test_other_options_reach_the_head(fused: Call) -> None:
    exact = everything(fused, torch.float32, True)
    rounded = everything(fused, torch.float32, True, compute_dtype=torch.bfloat16)
    assert 1e-6 < abs(rounded["loss"] - exact["loss"]) < 0.1
    definition = everything(fused, torch.float32, True, backend="reference")
    assert_same(definition, exact, torch.float32)
    with pytest.raises(ValueError, match="max_buffer_bytes: expected at least"):
        everything(fused, torch.float32, True, max_buffer_bytes=1)
    hidden, weight, bias = leaves(torch.float32)
    targets = some_targets().masked_fill(some_targets() == -100, -1)
    loss, _ = fused(hidden, weight, bias, targets, ignore_index=-1)
    assert loss.item() == pytest.approx(exact["loss"].item())


@pytest.mark.parametrize("fused", [fused_dpo, fused_sft])
def test_prompts_take_no_part(fused: Call) -> None:
    # rows without a target are gathered away: not even a NaN there matters
    hidden, weight, bias = leaves(torch.float32)
    expected = everything(fused, torch.float32, True)
    ignored = some_targets() == -100
    body = hidden.detach().masked_fill(ignored[:, None], torch.nan).requires_grad_()
    loss, metrics = fused(body, weight, bias, some_targets())
    found = dict(zip("hwb", torch.autograd.grad(loss, (body, weight, bias)), strict=True))
    assert_same({"loss": loss.detach(), **metrics, **found}, expected, torch.float32)
    assert not found["h"][ignored].any()


def test_without_gradients() -> None:
    hidden, weight, bias = leaves(torch.float32)
    with torch.no_grad():
        for fused, eager in ((fused_dpo, eager_dpo), (fused_sft, eager_sft)):
            loss, metrics = fused(hidden, weight, bias, some_targets())
            assert not loss.requires_grad
            expected, expected_metrics = eager(hidden, weight, bias, some_targets())
            found = {"loss": loss, **metrics}
            assert_same(found, {"loss": expected, **expected_metrics}, torch.float32)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_bounds_may_be_a_tensor(as_tensor: bool) -> None:
    hidden, weight, _ = leaves(torch.float32)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32) if as_tensor else BOUNDS
    reference = reference_logprob(torch.float32)
    loss, _ = fused_linear_dpo_loss(hidden, weight, some_targets(), bounds, reference, beta=BETA)
    expected, _ = eager_dpo(hidden, weight, None, some_targets())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_a_policy_that_is_its_reference_loses_ln_2(beta: float) -> None:
    hidden, weight, bias = leaves(torch.float32)
    targets = some_targets()
    with torch.no_grad():
        logprob, _, _ = eager_tokens(hidden, weight, bias, targets)
        sums = torch.stack([logprob[start:stop].sum() for start, stop in pairwise(BOUNDS)])
        loss, metrics = fused_linear_dpo_loss(
            hidden, weight, targets, BOUNDS, sums, beta=beta, bias=bias
        )
    assert loss.item() == pytest.approx(math.log(2), abs=beta * 2e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert metrics[name].item() == pytest.approx(0.0, abs=beta * 2e-5)
    assert metrics["logps/chosen"].item() == pytest.approx(sums[0::2].mean().item(), rel=1e-6)


def test_one_pass_with_the_policys_own_log_probs_is_exactly_ln_2() -> None:
    hidden, weight, bias = leaves(torch.float32)

    def sums(targets: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def pair_loss(pairs: PairLogprobs) -> Tensor:
            chosen, rejected = pairs.policy_chosen_logprob, pairs.policy_rejected_logprob
            seen.append(torch.stack([chosen.detach(), rejected.detach()], dim=1).flatten())
            return chosen - rejected

        fused_linear_preference_loss(hidden, weight, targets, BOUNDS, pair_loss, bias=bias)
        return torch.cat(seen)

    loss, metrics = fused_linear_dpo_loss(
        hidden, weight, some_targets(), BOUNDS, sums(some_targets()), bias=bias
    )
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/margins"].item() == 0.0
    assert metrics["rewards/accuracies"].item() == 0.0
    # at the start each pair pulls with beta / 2: up the chosen, down the rejected
    (found,) = torch.autograd.grad(loss, weight)
    logprob, _, _ = eager_tokens(hidden, weight, bias, some_targets())
    signs = torch.cat(
        [
            torch.full((stop - start,), -1.0 if index % 2 == 0 else 1.0)
            for index, (start, stop) in enumerate(pairwise(BOUNDS))
        ]
    )
    (expected,) = torch.autograd.grad((logprob * signs).sum() * 0.1 / 2 / NUM_PAIRS, weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
