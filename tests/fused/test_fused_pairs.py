"""The drop-in losses: normalisers, ties, lengths, means and wrong arguments."""

import math
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
)
from fastalign.losses import bradley_terry, dpo_rao_kupper, simpo
from fastalign.losses.chunk_losses import preference_loss_fn
from fastalign.ops.head.fused_linear_loss import fused_linear_loss
from fastalign.ops.preference_loss.pairs import PairLogprobs
from tests.fused.fused_cases import (
    BETA,
    BOUNDS,
    NUM_PAIRS,
    NUM_ROWS,
    VOCABULARY,
    WIDTH,
    Metrics,
    eager_tokens,
    everything,
    fused_dpo,
    fused_sft,
    leaves,
    reference_logprob,
    some_targets,
)


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
