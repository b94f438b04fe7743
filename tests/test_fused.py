"""The drop-in losses against the lines of eager PyTorch that they replace."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.fused import (
    fused_linear_dpo_loss,
    fused_linear_preference_loss,
    fused_linear_sft_loss,
    metric_means,
    preference_loss_fn,
)
from fastalign.losses import PairLogprobs, bradley_terry, dpo_rao_kupper, simpo
from fastalign.ops.fused_linear_loss import fused_linear_loss

VOCABULARY, WIDTH, BETA = 37, 8, 0.3
# Three pairs: chosen, rejected, chosen, ... each with a prompt of two ignored rows.
BOUNDS = [0, 7, 12, 16, 25, 31, 36]
REFERENCE = [-14.0, -9.0, -7.5, -21.0, -13.0, -11.0]
NUM_ROWS, NUM_PAIRS = BOUNDS[-1], 3

Metrics = dict[str, Tensor]
Call = Callable[..., tuple[Tensor, Metrics]]


def leaves(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden, weight and bias."""
    generator = torch.Generator().manual_seed(5)

    def leaf(*shape: int) -> Tensor:
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        return value.to(dtype).requires_grad_()

    return leaf(NUM_ROWS, WIDTH), leaf(VOCABULARY, WIDTH), leaf(VOCABULARY)


def some_targets() -> Tensor:
    targets = torch.arange(NUM_ROWS) * 5 % VOCABULARY
    for start in BOUNDS[:-1]:
        targets[start : start + 2] = -100
    return targets


def reference_logprob(dtype: torch.dtype) -> Tensor:
    return torch.tensor(REFERENCE, dtype=dtype)


def eager_tokens(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and correctness of each row, zero where ignored."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    is_target = targets != -100
    logprob = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy() * is_target
    return logprob, entropy, logits.argmax(-1) == targets


def eager_dpo(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Metrics]:
    logprob, entropy, correct = eager_tokens(hidden, weight, bias, targets)
    sums = torch.stack([logprob[start:stop].sum() for start, stop in pairwise(BOUNDS)])
    rewards = BETA * (sums - reference_logprob(sums.dtype))
    margins = rewards[0::2] - rewards[1::2]
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    num_targets = (targets != -100).sum()
    return loss, {
        "num_pairs": torch.tensor(NUM_PAIRS),
        "num_ties": torch.tensor(0),
        "num_target_tokens": num_targets,
        "logps/chosen": sums[0::2].mean(),
        "logps/rejected": sums[1::2].mean(),
        "rewards/chosen": rewards[0::2].mean(),
        "rewards/rejected": rewards[1::2].mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).to(sums.dtype).mean(),
        "entropy": entropy.sum() / num_targets,
        "mean_token_accuracy": correct.sum() / num_targets,
    }


def eager_sft(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Metrics]:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    _, entropy, correct = eager_tokens(hidden, weight, bias, targets)
    num_targets = (targets != -100).sum()
    return torch.nn.functional.cross_entropy(logits, targets), {
        "num_target_tokens": num_targets,
        "entropy": entropy.sum() / num_targets,
        "mean_token_accuracy": correct.sum() / num_targets,
    }


def fused_dpo(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **options: Any
) -> tuple[Tensor, Metrics]:
    reference = reference_logprob(hidden.dtype)
    return fused_linear_dpo_loss(
        hidden, weight, targets, BOUNDS, reference, beta=BETA, bias=bias, **options
    )


def fused_preference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **options: Any
) -> tuple[Tensor, Metrics]:
    def pair_loss(pairs: PairLogprobs) -> Tensor:
        policy_chosen, policy_rejected, chosen, rejected = pairs.logprobs()
        difference = BETA * ((policy_chosen - chosen) - (policy_rejected - rejected))
        return -torch.nn.functional.logsigmoid(difference)

    reference = reference_logprob(hidden.dtype)
    return fused_linear_preference_loss(
        hidden, weight, targets, BOUNDS, pair_loss, reference, beta=BETA, bias=bias, **options
    )


def fused_sft(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **options: Any
) -> tuple[Tensor, Metrics]:
    return fused_linear_sft_loss(hidden, weight, targets, bias=bias, **options)


def assert_same(found: Metrics, expected: Metrics, dtype: torch.dtype) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        slack = 64 * torch.finfo(dtype).eps * max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=0, atol=slack, msg=f"{name}: {found[name]}"
        )


def everything(call: Call, dtype: torch.dtype, with_bias: bool, **options: Any) -> Metrics:
    """Loss, metrics and gradients in one table."""
    values = leaves(dtype)
    hidden, weight, bias = values
    given = bias if with_bias else None
    loss, metrics = call(hidden, weight, given, some_targets(), **options)
    trained = values if with_bias else values[:2]
    gradients = torch.autograd.grad(loss, trained)
    table = dict(zip("hwb", gradients, strict=False))
    return {"loss": loss.detach(), **metrics, **table}


# --- the same as eager --------------------------------------------------------------------------


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


# --- DPO at its start ---------------------------------------------------------------------------


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


# --- normalisers --------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_parts_with_the_wholes_normaliser_add_up(kind: str, as_tensor: bool) -> None:
    fused, targets = (fused_sft if kind == "sft" else fused_dpo), some_targets()
    whole = everything(fused, torch.float64, True)
    number = float((targets != -100).sum()) if kind == "sft" else float(NUM_PAIRS)
    normaliser = torch.tensor(number, dtype=torch.float64) if as_tensor else number
    hidden, weight, bias = leaves(torch.float64)
    reference, total = reference_logprob(torch.float64), 0.0
    for first, last in ((0, 2), (2, 6)):  # the first pair, then the other two
        start, stop = BOUNDS[first], BOUNDS[last]
        part, part_targets = hidden[start:stop], targets[start:stop]
        if kind == "sft":
            loss, _ = fused_linear_sft_loss(
                part, weight, part_targets, bias=bias, normaliser=normaliser
            )
        else:
            loss, _ = fused_linear_dpo_loss(
                part,
                weight,
                part_targets,
                [bound - start for bound in BOUNDS[first : last + 1]],
                reference[first:last],
                beta=BETA,
                bias=bias,
                normaliser=normaliser,
            )
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole["loss"].item(), abs=1e-13)
    for name, leaf in zip("hwb", (hidden, weight, bias), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, whole[name], rtol=0, atol=1e-13)


def test_a_normaliser_scales_the_loss_but_not_the_metrics() -> None:
    plain = everything(fused_dpo, torch.float64, True)
    found = everything(fused_dpo, torch.float64, True, normaliser=float(10 * NUM_PAIRS))
    for name, value in plain.items():
        expected = value / 10 if name in ("loss", "h", "w", "b") else value
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-13)


# --- ties, margins, losses without a reference --------------------------------------------------


def test_ties_do_not_count_as_right_or_wrong() -> None:
    hidden, weight, _ = leaves(torch.float64)
    reference = reference_logprob(torch.float64)
    seen: list[list[bool]] = []

    def pair_loss(pairs: PairLogprobs) -> Tensor:
        seen.append(pairs.tie.tolist())
        return dpo_rao_kupper(*pairs.logprobs(), pairs.tie, beta=BETA, nu=2.0)

    def metrics_with(tie: list[bool] | None) -> Metrics:
        given = None if tie is None else torch.tensor(tie)
        _, metrics = fused_linear_preference_loss(
            hidden, weight, some_targets(), BOUNDS, pair_loss, reference, tie=given, beta=BETA
        )
        return metrics

    logprob, _, _ = eager_tokens(hidden, weight, None, some_targets())
    sums = torch.stack([logprob[start:stop].sum() for start, stop in pairwise(BOUNDS)])
    difference = sums - reference
    right = (difference[0::2] > difference[1::2]).tolist()
    assert sorted(set(right)) == [False, True]  # the example can tell
    for tie in ([False] * 3, [True, False, False], [False, True, False], [True, False, True]):
        found = metrics_with(tie)
        counted = [value for value, tied in zip(right, tie, strict=True) if not tied]
        assert found["rewards/accuracies"].item() == pytest.approx(sum(counted) / len(counted))
        assert found["num_ties"].item() == sum(tie)
        assert found["num_pairs"].item() == NUM_PAIRS
        assert seen[-1] == tie
    assert metrics_with([True] * 3)["rewards/accuracies"].item() == 0.0
    assert metrics_with(None)["num_ties"].item() == 0


@pytest.mark.parametrize("budget", [1_000, None])
def test_margins_and_ties_follow_their_pairs(budget: int | None) -> None:
    hidden, weight, bias = leaves(torch.float64)
    margin = torch.tensor([0.1, 2.0, -1.0], dtype=torch.float64)

    def pair_loss(pairs: PairLogprobs) -> Tensor:
        assert pairs.reference_chosen_logprob is None
        chosen, rejected = pairs.policy_chosen_logprob, pairs.policy_rejected_logprob
        return bradley_terry(chosen, rejected, margin=pairs.margin)

    loss, metrics = fused_linear_preference_loss(
        hidden,
        weight,
        some_targets(),
        BOUNDS,
        pair_loss,
        margin=margin,
        bias=bias,
        max_buffer_bytes=budget,
        beta=0.5,
    )
    logprob, _, _ = eager_tokens(hidden, weight, bias, some_targets())
    sums = torch.stack([logprob[start:stop].sum() for start, stop in pairwise(BOUNDS)])
    expected = -torch.nn.functional.logsigmoid(sums[0::2] - sums[1::2] - margin).mean()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(metrics["rewards/chosen"], 0.5 * sums[0::2].mean().detach())


@pytest.mark.parametrize("gathered", [True, False])
def test_lengths_are_those_of_target_tokens(gathered: bool) -> None:
    hidden, weight, _ = leaves(torch.float64)
    lengths = torch.tensor([stop - start - 2 for start, stop in pairwise(BOUNDS)])

    def pair_loss(pairs: PairLogprobs) -> Tensor:
        assert pairs.chosen_length.tolist() == lengths[0::2].tolist()
        assert pairs.rejected_length.tolist() == lengths[1::2].tolist()
        return simpo(
            pairs.policy_chosen_logprob,
            pairs.policy_rejected_logprob,
            pairs.chosen_length,
            pairs.rejected_length,
            beta=2.0,
            gamma=0.5,
        )

    if gathered:
        loss, _ = fused_linear_preference_loss(hidden, weight, some_targets(), BOUNDS, pair_loss)
    else:
        loss_fn = preference_loss_fn(pair_loss, BOUNDS, None, normaliser=NUM_PAIRS)
        loss, _ = fused_linear_loss(hidden, weight, some_targets(), BOUNDS[::2], loss_fn)
    logprob, _, _ = eager_tokens(hidden, weight, None, some_targets())
    sums = torch.stack([logprob[start:stop].sum() for start, stop in pairwise(BOUNDS)])
    means = 2.0 * sums / lengths
    expected = -torch.nn.functional.logsigmoid(means[0::2] - means[1::2] - 0.5).mean()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-13)


# --- nothing at all, and wrong arguments --------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 4])
def test_no_targets(rows: int) -> None:
    hidden = torch.zeros(rows, WIDTH, requires_grad=True)
    weight = torch.zeros(VOCABULARY, WIDTH, requires_grad=True)
    targets = torch.full((rows,), -100)
    loss, metrics = fused_linear_sft_loss(hidden, weight, targets)
    assert loss.item() == 0.0
    assert all(value.item() == 0.0 for value in metrics.values())
    assert not any(value.any() for value in torch.autograd.grad(loss, (hidden, weight)))
    pairs = [0, rows, rows]
    loss, metrics = fused_linear_dpo_loss(hidden, weight, targets, pairs, torch.zeros(2))
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["num_pairs"].item() == 1
    assert metrics["entropy"].item() == 0.0
    assert not any(value.any() for value in torch.autograd.grad(loss, (hidden, weight)))


def test_no_pairs() -> None:
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64)
    loss, metrics = fused_linear_dpo_loss(
        hidden, torch.zeros(VOCABULARY, WIDTH), targets, [0], torch.zeros(0)
    )
    assert loss.item() == 0.0
    assert all(value.item() == 0.0 for value in metrics.values())


def test_means_are_over_what_they_count() -> None:
    sums = {
        "num_pairs": torch.tensor(4),
        "num_ties": torch.tensor(1),
        "num_target_tokens": torch.tensor(10),
        "rewards/margins": torch.tensor(2.0),
        "rewards/accuracies": torch.tensor(2.0),
        "logps/chosen": torch.tensor(-8.0),
        "entropy": torch.tensor(5.0),
        "mean_token_accuracy": torch.tensor(3.0),
    }
    means = {name: value.item() for name, value in metric_means(sums).items()}
    assert means == pytest.approx(
        {
            "num_pairs": 4,
            "num_ties": 1,
            "num_target_tokens": 10,
            "rewards/margins": 0.5,
            "rewards/accuracies": 2 / 3,
            "logps/chosen": -2.0,
            "entropy": 0.5,
            "mean_token_accuracy": 0.3,
        }
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(NUM_ROWS, 2, WIDTH)}, "hidden: expected a floating"),
        ({"targets": some_targets()[:-1]}, r"targets: expected int64 \(36,\)"),
        ({"targets": some_targets().int()}, "targets: expected int64"),
        ({"targets": some_targets() + VOCABULARY}, "targets: expected 0..36 or -100"),
        ({"cu_seqlens": BOUNDS[:-1]}, "cu_seqlens: expected integers that rise from 0 to 36"),
        ({"cu_seqlens": [0, 9, 7, 36]}, "cu_seqlens: expected integers that rise"),
        ({"cu_seqlens": []}, "cu_seqlens: expected integers that rise"),
        ({"cu_seqlens": [0.0, 7.0, 36.0]}, "cu_seqlens: expected integers"),
        ({"cu_seqlens": [0, 36]}, r"response_bounds: expected 2B \+ 1 bounds, .* got 2"),
        ({"reference_logprob": torch.zeros(5)}, r"reference_logprob: expected \(6,\), got \(5,\)"),
        ({"tie": torch.zeros(6).bool()}, r"tie: expected \(3,\), got \(6,\)"),
        ({"margin": torch.zeros(2)}, r"margin: expected \(3,\), got \(2,\)"),
        ({"pair_loss": lambda pairs: pairs.tie.float().sum()}, "pair_loss: expected one loss for"),
        ({"reference_logprob": None}, "reference_logprob: expected one, for this loss needs it"),
        ({"softcap": -1.0}, "softcap: expected a positive number"),
        ({"temperature": torch.ones(3)}, "temperature: expected a number or"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    def pair_loss(pairs: PairLogprobs) -> Tensor:
        return pairs.logprobs()[1] - pairs.logprobs()[0]

    arguments = {
        "hidden": torch.zeros(NUM_ROWS, WIDTH),
        "weight": torch.zeros(VOCABULARY, WIDTH),
        "targets": some_targets(),
        "cu_seqlens": BOUNDS,
        "pair_loss": pair_loss,
        "reference_logprob": reference_logprob(torch.float32),
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        fused_linear_preference_loss(**arguments)
