"""`fused_linear_loss`: values, gradients, chunks and metrics."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.ops.head.fused_linear_loss import TokenChunk, fused_linear_loss
from tests.ops.head.fused_linear_loss.fused_linear_loss_cases import (
    BUDGETS,
    EAGER,
    GROUPS,
    IGNORED,
    KERNELS,
    ROWS,
    TRANSFORMS,
    VOCABULARY,
    assert_all_close,
    combined,
    group_loss,
    leaves,
    outputs,
    skip_unusable,
    some_targets,
)


def test_reference_is_what_torch_says() -> None:
    hidden, weight, bias = leaves(torch.float64)
    targets, bounds = some_targets(), GROUPS["uneven"]
    found = outputs([hidden, weight, bias], targets, bounds, softcap=2.0, **EAGER)
    logits = 2.0 * torch.tanh(torch.nn.functional.linear(hidden, weight, bias) / 2.0)
    logprob = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    is_target = targets != -100
    entropy = torch.distributions.Categorical(logits=logits).entropy() * is_target
    chunk = TokenChunk(
        logprob, entropy, (logits.argmax(-1) == targets), is_target, 0, ROWS, 0, len(bounds) - 1
    )
    loss, metrics = group_loss(bounds)(chunk)
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    expected = {"loss": loss, **metrics, **dict(zip("hwb", gradients, strict=True))}
    assert_all_close(found, expected)
    assert 0 < found["correct"] < found["targets"] == ROWS - len(IGNORED)


def test_reference_gradients_by_finite_differences() -> None:
    values = [value.detach()[:5].clone().requires_grad_() for value in leaves(torch.float64)]
    targets, bounds = torch.tensor([4, -100, 0, 2, 1]), [0, 2, 5]

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_linear_loss(
            hidden, weight, targets, bounds, group_loss(bounds), bias=bias, softcap=3.0, **EAGER
        )[0]

    assert torch.autograd.gradcheck(call, values)


@pytest.mark.parametrize(
    ("backend", "dtype", "transform", "groups", "budget"),
    combined(KERNELS, TRANSFORMS, GROUPS, BUDGETS),
)
def test_values_and_gradients(
    backend: str, dtype: torch.dtype, transform: str, groups: str, budget: int | None
) -> None:
    skip_unusable(backend, dtype)
    values, targets, options = leaves(dtype), some_targets(), TRANSFORMS[transform]
    if budget is not None and dtype == torch.float64:
        budget *= 2
    found = outputs(
        values, targets, GROUPS[groups], max_buffer_bytes=budget, backend=backend, **options
    )
    assert_all_close(found, outputs(values, targets, GROUPS[groups], **options, **EAGER))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("trained", ["h", "w", "b", "hw", "hb", "wb"])
def test_any_subset_may_be_trained(trained: str, budget: int | None) -> None:
    values, targets, bounds = leaves(torch.float32), some_targets(), GROUPS["uneven"]
    for name, value in zip("hwb", values, strict=True):
        value.requires_grad_(name in trained)
    found = outputs(values, targets, bounds, max_buffer_bytes=budget, softcap=2.0)
    assert_all_close(found, outputs(values, targets, bounds, softcap=2.0, **EAGER))


@pytest.mark.parametrize("trained", ["hw", "h"])
def test_without_a_bias(trained: str) -> None:
    values, targets, bounds = leaves(torch.float32)[:2], some_targets(), GROUPS["even"]
    values[1].requires_grad_("w" in trained)
    found = outputs(values, targets, bounds, max_buffer_bytes=3_000)
    assert_all_close(found, outputs(values, targets, bounds, **EAGER))


@pytest.mark.parametrize("groups", GROUPS)
def test_the_budget_changes_nothing(groups: str) -> None:
    values, targets = leaves(torch.float64), some_targets()
    expected = outputs(values, targets, GROUPS[groups])
    for budget in range(888, 20_000, 997):
        found = outputs(values, targets, GROUPS[groups], max_buffer_bytes=budget)
        assert_all_close(found, expected)


def spans_seen(bounds: list[int] | None, budget: int | None) -> list[tuple[int, int, int, int]]:
    hidden, weight, _ = leaves(torch.float32)
    seen = []

    def loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append((chunk.row_start, chunk.row_stop, chunk.group_start, chunk.group_stop))
        assert chunk.logprob.shape == (chunk.row_stop - chunk.row_start,)
        assert chunk.logprob.requires_grad
        assert chunk.logprob.is_leaf
        assert chunk.entropy.requires_grad
        assert chunk.is_target.tolist() == [
            row not in IGNORED for row in range(chunk.row_start, chunk.row_stop)
        ]
        return chunk.logprob.sum(), {}

    fused_linear_loss(hidden, weight, some_targets(), bounds, loss_fn, max_buffer_bytes=budget)
    return seen


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("groups", GROUPS)
def test_chunks_are_whole_groups_in_order(groups: str, budget: int | None) -> None:
    bounds = GROUPS[groups]
    borders = list(range(ROWS + 1)) if bounds is None else bounds
    seen = spans_seen(bounds, budget)
    rows = [(span[0], span[1]) for span in seen]
    assert rows[0][0] == 0
    assert rows[-1][1] == ROWS
    assert seen[0][2] == 0
    assert seen[-1][3] == len(borders) - 1
    for one, following in pairwise(seen):
        assert one[1] == following[0]
        assert one[3] == following[2]
    for row_start, row_stop, group_start, group_stop in seen:
        assert (borders[group_start], borders[group_stop]) == (row_start, row_stop)


def test_a_smaller_budget_makes_more_chunks() -> None:
    numbers = [len(spans_seen(GROUPS["even"], budget)) for budget in BUDGETS]
    assert numbers[0] == 7  # a group is larger than the budget, and comes alone
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[2] in range(2, 7)
    assert numbers[-1] == 1


def test_without_gradients() -> None:
    hidden, weight, bias = leaves(torch.float32)
    targets, bounds = some_targets(), GROUPS["uneven"]
    called = []

    def loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        called.append(chunk.logprob.requires_grad)
        return group_loss(bounds)(chunk)

    with torch.no_grad():
        found = fused_linear_loss(
            hidden, weight, targets, bounds, loss_fn, bias=bias, max_buffer_bytes=3_000
        )
        expected = fused_linear_loss(
            hidden, weight, targets, bounds, group_loss(bounds), bias=bias, **EAGER
        )
    assert called == [False]
    assert not found[0].requires_grad
    assert_all_close({"loss": found[0], **found[1]}, {"loss": expected[0], **expected[1]})


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_metrics_are_detached_sums_over_chunks(backend: str) -> None:
    hidden, weight, _ = leaves(torch.float32)

    def loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        metrics = {"rows": torch.tensor(chunk.logprob.numel()), "logprob": chunk.logprob.sum()}
        if chunk.row_start == 0:
            metrics["first"] = 2 * chunk.logprob[1]
        return chunk.logprob.sum(), metrics

    loss, metrics = fused_linear_loss(
        hidden, weight, some_targets(), None, loss_fn, max_buffer_bytes=1_500, backend=backend
    )
    assert loss.requires_grad
    assert not any(value.requires_grad for value in metrics.values())
    assert metrics["rows"] == ROWS
    assert metrics["logprob"].item() == pytest.approx(loss.item())
    assert metrics["first"] < 0


def test_a_loss_that_does_not_use_the_log_probs() -> None:
    hidden, weight, _ = leaves(torch.float32)
    for constant in (torch.tensor(2.0), torch.tensor(2.0, requires_grad=True)):
        loss, _ = fused_linear_loss(
            hidden, weight, some_targets(), [0, ROWS], lambda chunk, c=constant: (c * 1.0, {})
        )
        assert loss.item() == 2.0
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert not any(value.any() for value in gradients)


def test_an_error_in_the_loss_function_comes_through() -> None:
    hidden, weight, _ = leaves(torch.float32)

    def loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fused_linear_loss(hidden, weight, some_targets(), None, loss_fn)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("scale", [1.0, -3.0, 0.0, 65_536.0])
def test_upstream_gradient_scales(scale: float) -> None:
    values, targets, bounds = leaves(torch.float64), some_targets(), GROUPS["even"]
    expected = outputs(values, targets, bounds)
    hidden, weight, bias = values
    loss, _ = fused_linear_loss(
        hidden, weight, targets, bounds, group_loss(bounds), bias=bias, max_buffer_bytes=3_000
    )
    gradients = torch.autograd.grad(loss * scale, values)
    found = dict(zip("hwb", gradients, strict=True))
    assert_all_close(found, {name: scale * expected[name] for name in "hwb"})


def test_gradients_accumulate_over_calls_and_through_a_body() -> None:
    def gradients(**options: Any) -> dict[str, Tensor]:
        hidden, weight, _ = leaves(torch.float64)
        for bounds in (GROUPS["even"], GROUPS["one"]):
            body = torch.tanh(hidden)
            loss, _ = fused_linear_loss(
                body, weight, some_targets(), bounds, group_loss(bounds), **options
            )
            (loss / 2).backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return {"h": hidden.grad, "w": weight.grad}

    assert_all_close(gradients(max_buffer_bytes=3_000), gradients(**EAGER))


def test_tied_weight_gets_both_gradients() -> None:
    def gradient(**options: Any) -> dict[str, Tensor]:
        embedding, bounds = leaves(torch.float64)[1], GROUPS["uneven"]
        hidden = torch.tanh(embedding[torch.arange(ROWS) * 3 % VOCABULARY] * 1.5)
        loss, _ = fused_linear_loss(
            hidden, embedding, some_targets(), bounds, group_loss(bounds), **options
        )
        loss.backward()
        assert embedding.grad is not None
        return {"embedding": embedding.grad}

    assert_all_close(gradient(max_buffer_bytes=6_000), gradient(**EAGER))


def test_a_second_backward_is_refused() -> None:
    hidden, weight, _ = leaves(torch.float32)
    loss, _ = fused_linear_loss(hidden, weight, some_targets(), None, group_loss(None))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="computes its gradient once"):
        loss.backward()
