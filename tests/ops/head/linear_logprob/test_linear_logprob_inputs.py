"""`linear_logprob`: dtypes, shapes, strides, registration and wrong arguments."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.ops.backends import unusable_reason
from fastalign.ops.head.linear_logprob import linear_logprob
from fastalign.ops.head.linear_logprob.op import linear_logprob_forward
from fastalign.ops.head.linear_logprob.reference import row_statistics
from tests.ops.head.linear_logprob.linear_logprob_cases import (
    BUDGETS,
    EAGER,
    ROWS,
    VOCABULARY,
    WIDTH,
    assert_all_close,
    clones,
    largest,
    leaves,
    outputs,
    some_targets,
)


def eager_in(dtype: torch.dtype, values: list[Tensor], targets: Tensor) -> list[Tensor]:
    """What a trainer writes without this package: logits in `dtype`, float32 log-softmax."""
    hidden, weight, bias = (value.to(dtype) for value in values)
    log_p = torch.nn.functional.linear(hidden, weight, bias).float().log_softmax(-1)
    ignored = targets == -100
    logprob = log_p.gather(1, targets.masked_fill(ignored, 0)[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    logprob, entropy = logprob.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0)
    upstream = torch.linspace(-1.0, 2.0, 2 * targets.numel()).chunk(2)
    total = (logprob * upstream[0]).sum() + (entropy * upstream[1]).sum()
    return [logprob.detach(), entropy.detach(), *torch.autograd.grad(total, values)]


@pytest.mark.parametrize("budget", [3_000, None])
@pytest.mark.parametrize("weight_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_eager(
    dtype: torch.dtype, weight_dtype: str, budget: int | None
) -> None:
    master = dtype if weight_dtype == "same" else torch.float32
    values, targets = leaves(dtype, weight_dtype=master), some_targets()
    # every route takes the same numbers, so the truth is that of the rounded operands
    values = [v.detach().to(dtype).to(v.dtype).requires_grad_() for v in values]
    options = {"compute_dtype": dtype, "max_buffer_bytes": budget}
    found = outputs(values, targets, "logprob+entropy", **options)
    eager = eager_in(dtype, values, targets)
    exact = [value.detach().double().requires_grad_() for value in values]
    truth = outputs(exact, targets, "logprob+entropy", **EAGER)
    expected_dtypes = [torch.float32, torch.float32, *(value.dtype for value in values)]
    for index, one in enumerate(found):
        worse, true = eager[index], truth[index]
        assert one.dtype == expected_dtypes[index]
        slack = 16 * torch.finfo(torch.float32).eps * largest(true)
        if index >= 2:
            # the operands of a gradient's products, or the gradient itself, are rounded once more
            slack += torch.finfo(dtype).eps / 2 * largest(true)
        assert largest(one.double() - true) <= largest(worse.double() - true) + slack
    # what is rounded is the operands: nothing after them is
    for one, true in zip(found[:2], truth[:2], strict=True):
        assert largest(one.double() - true) <= 16 * torch.finfo(torch.float32).eps * largest(true)


def test_master_weight_is_rounded_for_the_products_only() -> None:
    values, targets = leaves(torch.float32), some_targets()
    rounded = [value.detach().bfloat16().float().requires_grad_() for value in values[:2]]
    found = outputs(values[:2], targets, "logprob", compute_dtype=torch.bfloat16)
    expected = outputs(rounded, targets, "logprob", **EAGER)
    assert_all_close(found[:2], expected[:2])
    for one, other in zip(found[2:], expected[2:], strict=True):  # brackets may be bfloat16
        assert largest(one - other) <= torch.finfo(torch.bfloat16).eps / 2 * largest(other)
    unrounded = outputs(values[:2], targets, "logprob")
    assert largest(found[0] - unrounded[0]) > 1e-4


def test_autocast_sets_the_products_dtype() -> None:
    values, targets = leaves(torch.float32), some_targets()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs(values, targets, "logprob+entropy")
    expected = outputs(values, targets, "logprob+entropy", compute_dtype=torch.bfloat16)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_autocast_leaves_float64_and_a_given_dtype_alone() -> None:
    hidden, weight, _ = leaves(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_logprob(hidden, weight, some_targets()).dtype == torch.float64
        single = linear_logprob(
            hidden.float(), weight.float(), some_targets(), compute_dtype=torch.float32
        )
    assert torch.equal(single, linear_logprob(hidden.float(), weight.float(), some_targets()))


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("trained", ["hwb", "h"])
def test_no_row_and_one_row(rows: int, trained: str) -> None:
    values, targets = leaves(torch.float32, rows), some_targets(rows, ignored=())
    for name, value in zip("hwb", values, strict=True):
        value.requires_grad_(name in trained)
    found = outputs(values, targets, "logprob+entropy")
    assert found[0].shape == (rows,)
    assert_all_close(found, outputs(values, targets, "logprob+entropy", **EAGER))


@pytest.mark.parametrize("ignore_index", [-100, -1, 11])
@pytest.mark.parametrize("budget", BUDGETS)
def test_ignored_rows_are_zero_everywhere(ignore_index: int, budget: int | None) -> None:
    values = leaves(torch.float32)
    targets = some_targets().masked_fill(some_targets() == -100, ignore_index)
    ignored = targets == ignore_index
    found = outputs(
        values, targets, "logprob+entropy", ignore_index=ignore_index, max_buffer_bytes=budget
    )
    for value in found[:3]:
        assert not value[ignored].any()
        assert value[~ignored].any()
    without = [values[0].detach()[~ignored].requires_grad_(), *values[1:]]
    logprob = linear_logprob(without[0], without[1], targets[~ignored], bias=without[2])
    assert_all_close([found[0][~ignored]], [logprob.detach()])


def test_nothing_but_ignored_rows() -> None:
    found = outputs(leaves(torch.float32), torch.full((ROWS,), -100), "logprob+entropy")
    assert not any(value.any() for value in found)


@pytest.mark.parametrize("budget", BUDGETS)
def test_any_strides(budget: int | None) -> None:
    values, targets = leaves(torch.float32), some_targets()
    hidden = torch.zeros(WIDTH, 2 * ROWS)[:, ::2].t()
    weight = torch.zeros(WIDTH + 3, VOCABULARY + 5)[2 : WIDTH + 2, 3 : VOCABULARY + 3].t()
    bias = torch.zeros(VOCABULARY, 2)[:, 1]
    strided = [hidden.copy_(values[0]), weight.copy_(values[1]), bias.copy_(values[2])]
    assert not any(value.is_contiguous() for value in strided)
    strided = [value.detach().requires_grad_() for value in strided]
    found = outputs(strided, targets, "logprob+entropy", max_buffer_bytes=budget)
    contiguous = outputs(values, targets, "logprob+entropy", max_buffer_bytes=budget)
    assert_all_close(found, contiguous)


def test_a_broadcast_upstream_gradient() -> None:
    hidden, weight, _ = leaves(torch.float32)
    linear_logprob(hidden, weight, some_targets()).sum().backward()
    expected_hidden, expected_weight, _ = leaves(torch.float32)
    linear_logprob(expected_hidden, expected_weight, some_targets(), **EAGER).sum().backward()
    assert_all_close([hidden.grad, weight.grad], [expected_hidden.grad, expected_weight.grad])


def test_tied_weight_gets_both_gradients() -> None:
    def gradient(**options: Any) -> Tensor:
        embedding = leaves(torch.float64)[1]
        token_ids = torch.arange(ROWS) * 3 % VOCABULARY
        hidden = torch.tanh(embedding[token_ids] * 1.5)
        linear_logprob(hidden, embedding, some_targets(), **options).sum().backward()
        assert embedding.grad is not None
        return embedding.grad

    assert_all_close([gradient(max_buffer_bytes=6_000)], [gradient(**EAGER)])


def test_a_slice_of_a_larger_weight() -> None:
    def gradient(**options: Any) -> Tensor:
        padded = torch.randn(
            VOCABULARY + 7, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True
        )
        linear_logprob(
            leaves(torch.float32)[0], padded[:VOCABULARY], some_targets(), **options
        ).sum().backward()
        assert padded.grad is not None
        return padded.grad

    assert_all_close([gradient()], [gradient(**EAGER)])


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_huge_logits_stay_finite(scale: float) -> None:
    values, targets = leaves(torch.float32), some_targets()
    values[0] = (values[0].detach() * scale).requires_grad_()
    found = outputs(values, targets, "logprob+entropy")
    assert all(value.isfinite().all() for value in found)
    assert_all_close(found, outputs(values, targets, "logprob+entropy", **EAGER), ulps=256)


def test_a_banned_token_has_no_probability_and_no_nan() -> None:
    hidden, weight, bias = leaves(torch.float32)
    banned = bias.detach().clone()
    banned[1] = -torch.inf  # no row's target
    values = [hidden, weight, banned.requires_grad_()]
    targets = some_targets()
    targets[targets == 1] = 2
    for budget in BUDGETS:
        found = outputs(values, targets, "logprob+entropy", max_buffer_bytes=budget)
        assert all(value.isfinite().all() for value in found)
        assert not found[3][1].any()
        assert found[4][1] == 0


@pytest.mark.parametrize("trained", ["", "h", "hwb", "hAB"])
def test_registration(trained: str) -> None:
    needs = [name in trained for name in "hwbAB"]
    of_lora = (torch.randn(ROWS, 2), torch.randn(VOCABULARY, 2)) if "A" in trained else (None, None)
    values = [
        None if value is None else value.detach().requires_grad_(need)
        for value, need in zip((*leaves(torch.float32), *of_lora), needs, strict=True)
    ]
    inputs = (*values[:3], some_targets(), torch.tensor([0.7]), *values[3:])
    backends = [b for b in ("torch", "native") if unusable_reason(b, "cpu", torch.float32) is None]
    for backend, budget in itertools.product(backends, (3_000, 100_000)):
        options = (2.0, 0.5, -100, torch.float32, budget, needs, True, backend)
        torch.library.opcheck(linear_logprob_forward, (*inputs, *options))


def test_traced_by_the_compiler() -> None:
    values, targets = leaves(torch.float32), some_targets()
    compiled = torch.compile(linear_logprob, backend="aot_eager", fullgraph=True)
    hidden, weight, bias = clones(values)
    compiled(hidden, weight, targets, bias=bias).sum().backward()
    expected = clones(values)
    linear_logprob(expected[0], expected[1], targets, bias=expected[2]).sum().backward()
    assert_all_close([v.grad for v in (hidden, weight, bias)], [v.grad for v in expected])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(2, 3, WIDTH)}, r"hidden: expected a floating \(T, D\)"),
        ({"hidden": torch.zeros(3, WIDTH, dtype=torch.int64)}, "hidden: expected a floating"),
        ({"weight": torch.zeros(VOCABULARY, WIDTH + 1)}, r"weight: expected \(V, 8\)"),
        ({"weight": torch.zeros(0, WIDTH)}, "weight: expected"),
        ({"weight": torch.zeros(VOCABULARY, WIDTH, device="meta")}, "weight: expected on cpu"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets: expected int64 \(3,\)"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets: expected int64"),
        ({"targets": torch.tensor([0, VOCABULARY, 0])}, "targets: .* got 37 at row 1"),
        ({"targets": torch.tensor([0, 0, -1])}, "targets: .* got -1 at row 2"),
        ({"bias": torch.zeros(VOCABULARY + 1)}, r"bias: expected \(37,\)"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"temperature": float("nan")}, "temperature: expected a positive number, got nan"),
        ({"temperature": 1e300}, r"temperature: expected a number from 1\.2e-38 to 3\.4e\+38"),
        ({"temperature": 1e-300}, r"temperature: expected a number from 1\.2e-38 to 3\.4e\+38"),
        ({"temperature": torch.ones(2)}, r"temperature: expected a number or \(3,\)"),
        ({"temperature": torch.ones(3, requires_grad=True)}, "temperature: expected no gradient"),
        ({"softcap": 0.0}, "softcap: expected a positive number or None"),
        ({"logit_scale": -1.0}, "logit_scale: expected a positive number"),
        ({"compute_dtype": torch.int64}, "compute_dtype: expected bfloat16"),
        ({"compute_dtype": torch.float8_e4m3fn}, "compute_dtype: expected bfloat16"),
        ({"hidden": torch.zeros(3, WIDTH).bfloat16()}, "compute_dtype: expected one to be given"),
        (
            {"max_buffer_bytes": 147, "backend": "triton"},
            "max_buffer_bytes: expected at least 148 .* got 147",
        ),
        (
            {"max_buffer_bytes": 443, "backend": "torch"},
            "max_buffer_bytes: expected at least 444 .* got 443",
        ),
        ({"backend": "cuda"}, "backend: expected one of 'auto', 'reference', 'torch', .* 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden": torch.zeros(3, WIDTH),
        "weight": torch.zeros(VOCABULARY, WIDTH),
        "targets": torch.zeros(3, dtype=torch.int64),
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)


def test_a_target_that_is_no_column_gives_nan() -> None:
    """In the definition, as in the kernels: on a GPU targets are not checked first."""
    logits = torch.randn(4, 9, dtype=torch.float64).requires_grad_()
    logprob, entropy, is_argmax = row_statistics(logits, torch.tensor([3, 9, -1, -100]), -100)
    (gradient,) = torch.autograd.grad(logprob.sum(), logits)
    assert logprob.isnan().tolist() == [False, True, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, True, False]
    assert gradient[[0, 3]].isfinite().all()
    assert entropy.isfinite().all()
    assert not is_argmax[1:].any()
