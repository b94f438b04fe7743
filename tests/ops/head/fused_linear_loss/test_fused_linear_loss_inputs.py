"""`fused_linear_loss`: dtypes, shapes, strides and wrong arguments."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.ops.head.fused_linear_loss import TokenChunk, fused_linear_loss
from tests.ops.head.fused_linear_loss.fused_linear_loss_cases import (
    BUDGETS,
    EAGER,
    GROUPS,
    ROWS,
    VOCABULARY,
    WIDTH,
    assert_all_close,
    group_loss,
    largest,
    leaves,
    outputs,
    some_targets,
)


def eager_in(
    dtype: torch.dtype, values: list[Tensor], targets: Tensor, bounds: list[int]
) -> dict[str, Tensor]:
    """What a trainer writes without this package: logits in `dtype`, float32 log-softmax."""
    logits = torch.nn.functional.linear(*(value.to(dtype) for value in values)).float()
    logprob = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    empty = torch.zeros(0)
    chunk = TokenChunk(logprob, empty, empty, empty, 0, ROWS, 0, len(bounds) - 1)
    loss, _ = group_loss(bounds)(chunk)
    gradients = torch.autograd.grad(loss, values)
    return {"loss": loss.detach(), **dict(zip("hwb", gradients, strict=True))}


@pytest.mark.parametrize("budget", [1_500, None])
@pytest.mark.parametrize("weight_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_eager(
    dtype: torch.dtype, weight_dtype: str, budget: int | None
) -> None:
    master = dtype if weight_dtype == "same" else torch.float32
    values, targets = leaves(dtype, weight_dtype=master), some_targets()
    bounds = GROUPS["uneven"]
    assert bounds is not None
    # every route takes the same numbers, so the truth is that of the rounded operands
    values = [v.detach().to(dtype).to(v.dtype).requires_grad_() for v in values]
    found = outputs(values, targets, bounds, compute_dtype=dtype, max_buffer_bytes=budget)
    eager = eager_in(dtype, values, targets, bounds)
    exact = [value.detach().double().requires_grad_() for value in values]
    truth = outputs(exact, targets, bounds, **EAGER)
    expected_dtypes = dict(zip("hwb", (value.dtype for value in values), strict=True))
    for name, worse in eager.items():
        one, true = found[name], truth[name]
        assert one.dtype == expected_dtypes.get(name, torch.float32)
        slack = 16 * torch.finfo(torch.float32).eps * largest(true)
        if name in "hwb":
            # the operands of a gradient's products, or the gradient itself, are rounded once more
            slack += torch.finfo(dtype).eps / 2 * largest(true)
        assert largest(one.double() - true) <= largest(worse.double() - true) + slack


def test_float16_gradients_meet_the_loss_scale_before_they_are_rounded() -> None:
    # coefficients of 2^-26 vanish in float16; scaled by 2^16 they do not
    values, targets = leaves(torch.float16), some_targets()

    def loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        return chunk.logprob.sum() * 2.0**-26, {}

    loss, _ = fused_linear_loss(values[0], values[1], targets, None, loss_fn)
    found = torch.autograd.grad(loss * 2.0**16, values[:2])
    exact = [value.detach().double().requires_grad_() for value in values[:2]]
    loss, _ = fused_linear_loss(*exact, targets, None, loss_fn, **EAGER)
    for one, true in zip(found, torch.autograd.grad(loss * 2.0**16, exact), strict=True):
        smallest = 2.0**-24  # the spacing of float16's smallest numbers
        assert largest(one.double() - true) <= 2.0**-11 * largest(true) + smallest / 2


def test_autocast_sets_the_products_dtype() -> None:
    values, targets, bounds = leaves(torch.float32), some_targets(), GROUPS["even"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs(values, targets, bounds)
    expected = outputs(values, targets, bounds, compute_dtype=torch.bfloat16)
    for name, value in found.items():
        assert torch.equal(value, expected[name])
    assert found["w"].dtype == torch.float32


@pytest.mark.parametrize("trained", ["hwb", "h"])
@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 0, 0], None])
def test_no_rows(bounds: list[int] | None, trained: str) -> None:
    values = leaves(torch.float32, rows=0)
    for name, value in zip("hwb", values, strict=True):
        value.requires_grad_(name in trained)
    targets = torch.zeros(0, dtype=torch.int64)
    found = outputs(values, targets, bounds)
    assert_all_close(found, outputs(values, targets, bounds, **EAGER))
    assert not any(found[name].any() for name in trained)


def test_one_row() -> None:
    values, targets = leaves(torch.float32, rows=1), torch.tensor([3])
    found = outputs(values, targets, [0, 1])
    assert_all_close(found, outputs(values, targets, [0, 1], **EAGER))


@pytest.mark.parametrize("budget", BUDGETS)
def test_ignored_rows_count_for_nothing(budget: int | None) -> None:
    values, targets, bounds = leaves(torch.float32), some_targets(), GROUPS["uneven"]
    assert bounds is not None
    found = outputs(values, targets, bounds, max_buffer_bytes=budget)
    kept = targets != -100
    assert not found["h"][~kept].any()
    before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
    without = [values[0].detach()[kept].requires_grad_(), *values[1:]]
    expected = outputs(without, targets[kept], before[bounds].tolist(), max_buffer_bytes=budget)
    assert_all_close({**found, "h": found["h"][kept]}, expected)


@pytest.mark.parametrize("budget", BUDGETS)
def test_any_strides(budget: int | None) -> None:
    values, targets, bounds = leaves(torch.float32), some_targets(), GROUPS["even"]
    hidden = torch.zeros(WIDTH, 2 * ROWS)[:, ::2].t()
    weight = torch.zeros(WIDTH + 3, VOCABULARY + 5)[2 : WIDTH + 2, 3 : VOCABULARY + 3].t()
    strided = [hidden.copy_(values[0]), weight.copy_(values[1])]
    assert not any(value.is_contiguous() for value in strided)
    strided = [value.detach().requires_grad_() for value in strided]
    found = outputs(strided, targets, bounds, max_buffer_bytes=budget)
    assert_all_close(found, outputs(values[:2], targets, bounds, max_buffer_bytes=budget))


@pytest.mark.parametrize("as_tensor", [True, False])
def test_bounds_may_be_a_tensor(as_tensor: bool) -> None:
    hidden, weight, _ = leaves(torch.float32)
    bounds: Any = GROUPS["even"]
    loss_fn = group_loss(bounds)
    given = torch.tensor(bounds, dtype=torch.int32) if as_tensor else tuple(bounds)
    loss, _ = fused_linear_loss(hidden, weight, some_targets(), given, loss_fn)
    expected, _ = fused_linear_loss(hidden, weight, some_targets(), bounds, loss_fn, **EAGER)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(2, 3, WIDTH)}, r"hidden: expected a floating \(T, D\)"),
        ({"weight": torch.zeros(VOCABULARY, WIDTH + 1)}, r"weight: expected \(V, 8\)"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets: expected int64 \(3,\)"),
        ({"targets": torch.tensor([0, VOCABULARY, 0])}, "targets: .* got 37 at row 1"),
        ({"segments": [0, 2]}, r"segments: expected bounds from 0 to 3 rows, got 0\.\.2"),
        ({"segments": [1, 3]}, r"segments: expected bounds from 0 to 3 rows, got 1\.\.3"),
        ({"segments": []}, "segments: .* got no bounds"),
        ({"segments": [0, 2, 1, 3]}, "segments: .* got 2, 1 at group 1"),
        ({"segments": torch.tensor([[0, 3]])}, "segments: expected integers"),
        ({"segments": torch.tensor([0.0, 3.0])}, "segments: expected integers"),
        ({"bias": torch.zeros(VOCABULARY + 1)}, r"bias: expected \(37,\)"),
        ({"temperature": -1.0}, "temperature: expected a positive number"),
        ({"temperature": torch.ones(2)}, r"temperature: expected a number or \(3,\)"),
        ({"softcap": -1.0}, "softcap: expected a positive number or None"),
        ({"logit_scale": 0.0}, "logit_scale: expected a positive number"),
        ({"compute_dtype": torch.int64}, "compute_dtype: expected bfloat16"),
        ({"hidden": torch.zeros(3, WIDTH).bfloat16()}, "compute_dtype: expected one to be given"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], message: str, backend: str) -> None:
    arguments = {
        "hidden": torch.zeros(3, WIDTH),
        "weight": torch.zeros(VOCABULARY, WIDTH),
        "targets": torch.zeros(3, dtype=torch.int64),
        "segments": [0, 3],
        "loss_fn": group_loss([0, 3]),
        "backend": backend,
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        fused_linear_loss(**arguments)


@pytest.mark.parametrize("trained", [True, False])
def test_a_budget_too_small_and_an_unknown_backend(trained: bool) -> None:
    hidden, weight, _ = leaves(torch.float32)
    hidden.requires_grad_(trained)
    weight.requires_grad_(trained)
    arguments = (hidden, weight, some_targets(), None, group_loss(None))
    with pytest.raises(ValueError, match=r"max_buffer_bytes: expected at least 444 .* got 443"):
        fused_linear_loss(*arguments, max_buffer_bytes=443, backend="torch")
    with pytest.raises(ValueError, match=r"backend: expected one of 'auto', .* got 'cuda'"):
        fused_linear_loss(*arguments, backend="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_loss_that_is_not_a_scalar(backend: str) -> None:
    hidden, weight, _ = leaves(torch.float32)
    with pytest.raises(ValueError, match=r"loss_fn: expected a scalar loss, got shape \(21,\)"):
        fused_linear_loss(
            hidden,
            weight,
            some_targets(),
            None,
            lambda chunk: (chunk.logprob, {}),
            backend=backend,
        )
