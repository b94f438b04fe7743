"""`linear_kl`: dtypes, shapes, strides, registration and wrong arguments."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.ops import linear_kl
from fastalign.ops.head.linear_kl.op import linear_kl_forward
from tests.ops.head.linear_kl.linear_kl_cases import (
    BUDGETS,
    DIRECTIONS,
    RESULTS,
    outputs,
    reference_head,
)
from tests.ops.head.linear_logprob.linear_logprob_cases import (
    EAGER,
    VOCABULARY,
    WIDTH,
    assert_all_close,
    clones,
    largest,
    leaves,
    skip_unusable,
    some_targets,
)

FLOAT = torch.float32
EVERYTHING = "logprob+kl+entropy"


def eager_in(
    dtype: torch.dtype, values: list[Tensor], other: list[Tensor], targets: Tensor, through: str
) -> list[Tensor]:
    """What a trainer writes without this package: logits in `dtype`, float32 log-softmax."""
    log_probs = []
    for head in (values, other):
        hidden, weight, bias = (value.to(dtype) for value in head)
        logits = torch.nn.functional.linear(hidden, weight, bias)
        log_probs.append(logits.float().log_softmax(-1))
    log_p, log_q = log_probs
    ignored = targets == -100
    picked = targets.masked_fill(ignored, 0)[:, None]
    found = {
        "logprob": log_p.gather(1, picked).squeeze(1),
        "reference_logprob": log_q.gather(1, picked).squeeze(1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
    }
    found = {name: value.masked_fill(ignored, 0.0) for name, value in found.items()}
    upstream = torch.linspace(-1.0, 2.0, 3 * targets.numel()).view(3, -1)
    by_name = dict(zip(("logprob", "kl", "entropy"), upstream, strict=True))
    total = sum((found[name] * by_name[name]).sum() for name in through.split("+"))
    results = [found[name].detach() for name in RESULTS]
    return [*results, *torch.autograd.grad(total, values)]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("through", ["logprob+kl", EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_eager(
    dtype: torch.dtype, through: str, budget: int | None
) -> None:
    values, other, targets = leaves(dtype), reference_head(dtype), some_targets()
    options = {"compute_dtype": dtype, "max_buffer_bytes": budget}
    found = outputs(values, other, targets, through, **options)
    eager = eager_in(dtype, values, other, targets, through)
    exact = [value.detach().double().requires_grad_() for value in values]
    truth = outputs(exact, [v.double() for v in other], targets, through, **EAGER)
    for index, (one, worse, true) in enumerate(zip(found, eager, truth, strict=True)):
        assert one.dtype == (FLOAT if index < 4 else dtype)
        # what is rounded before the results is the operands: nothing after them is
        slack = 16 * torch.finfo(FLOAT).eps * largest(true)
        if index >= 4:
            # the operands of a gradient's products, or the gradient itself, are rounded once more
            slack += torch.finfo(dtype).eps / 2 * largest(true) + largest(worse.double() - true)
        assert largest(one.double() - true) <= slack


def test_a_float32_master_weight_gets_a_float32_gradient() -> None:
    values, other, targets = leaves(FLOAT), reference_head(FLOAT), some_targets()
    rounded = [value.detach().bfloat16().float().requires_grad_() for value in values[:2]]
    rounded_other = [value.bfloat16().float() for value in other[:2]]
    options = {"compute_dtype": torch.bfloat16}
    found = outputs(values[:2], other[:2], targets, "logprob+kl", **options)
    expected = outputs(rounded, rounded_other, targets, "logprob+kl", **EAGER)
    assert_all_close(found[:4], expected[:4])
    for one, true in zip(found[4:], expected[4:], strict=True):  # brackets may be bfloat16
        assert one.dtype == FLOAT
        assert largest(one - true) <= 2 * torch.finfo(torch.bfloat16).eps * largest(true)


def test_autocast_sets_the_products_dtype() -> None:
    values, other, targets = leaves(FLOAT), reference_head(FLOAT), some_targets()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs(values, other, targets, EVERYTHING)
    expected = outputs(values, other, targets, EVERYTHING, compute_dtype=torch.bfloat16)
    assert all(torch.equal(one, true) for one, true in zip(found, expected, strict=True))


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("trained", ["hwb", "h"])
def test_no_row_and_one_row(rows: int, trained: str) -> None:
    values, targets = leaves(FLOAT, rows), some_targets(rows, ignored=())
    other = reference_head(FLOAT, rows)
    for name, value in zip("hwb", values, strict=True):
        value.requires_grad_(name in trained)
    for through in ("logprob+kl", EVERYTHING):
        found = outputs(values, other, targets, through)
        assert found[0].shape == (rows,)
        assert_all_close(found, outputs(values, other, targets, through, **EAGER))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("ignore_index", [-100, 11])
def test_ignored_rows_are_zero_everywhere(ignore_index: int, budget: int | None) -> None:
    values, other = leaves(FLOAT), reference_head(FLOAT)
    targets = some_targets().masked_fill(some_targets() == -100, ignore_index)
    ignored = targets == ignore_index
    values[0] = values[0].detach().masked_fill(ignored[:, None], torch.nan).requires_grad_()
    other[0] = other[0].masked_fill(ignored[:, None], torch.nan)
    options = {"ignore_index": ignore_index, "max_buffer_bytes": budget}
    for through in ("logprob+kl", EVERYTHING):
        found = outputs(values, other, targets, through, **options)
        assert all(value.isfinite().all() for value in found)
        for value in found[:5]:
            assert not value[ignored].any()
            assert value[~ignored].any()


@pytest.mark.parametrize("budget", BUDGETS)
def test_any_strides(budget: int | None) -> None:
    def strided(value: Tensor) -> Tensor:
        place = torch.zeros(*(2 * size for size in value.shape))
        view = place[1::2, 1::2] if value.ndim == 2 else place[1::2]
        return view.copy_(value.detach())

    values, other, targets = leaves(FLOAT), reference_head(FLOAT), some_targets()
    spread = [strided(value).requires_grad_() for value in values]
    spread_other = [strided(value) for value in other]
    assert not any(value.is_contiguous() for value in [*spread, *spread_other])
    options = {"max_buffer_bytes": budget}
    found = outputs(spread, spread_other, targets, EVERYTHING, **options)
    assert_all_close(found, outputs(values, other, targets, EVERYTHING, **options))


@pytest.mark.parametrize(
    ("trained", "backend", "budget"),
    [
        ("", "torch", 100_000),
        ("h", "native", 5_000),
        ("hwb", "torch", 5_000),
        ("hwb", "native", 100_000),
    ],
)
def test_registration(trained: str, backend: str, budget: int) -> None:
    skip_unusable(backend, FLOAT)
    needs = [name in trained for name in "hwb"]
    values = [v.detach().requires_grad_(n) for v, n in zip(leaves(FLOAT), needs, strict=True)]
    tensors = (*values, *reference_head(FLOAT), some_targets(), torch.tensor([0.7]))
    options = (True, 2.0, 0.5, -100, FLOAT, budget, needs, backend)
    torch.library.opcheck(linear_kl_forward, (*tensors, *options))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_traced_by_the_compiler(direction: str) -> None:
    values, other, targets = leaves(FLOAT), reference_head(FLOAT), some_targets()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        found = linear_kl(hidden, weight, *other[:2], targets, direction=direction, bias=bias)  # type: ignore[arg-type]
        return (found.logprob + found.kl).sum()

    plain, traced = clones(values), clones(values)
    loss(*plain).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(*traced).backward()
    assert_all_close([v.grad for v in traced], [v.grad for v in plain])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"direction": "backward"}, "direction: expected 'reverse' or 'forward', got 'backward'"),
        ({"hidden": torch.zeros(3, WIDTH).int()}, "hidden: expected a floating"),
        ({"targets": torch.tensor([0, VOCABULARY, 0])}, "targets: .* got 37 at row 1"),
        (
            {"reference_hidden": torch.zeros(2, 5)},
            r"reference_hidden: expected a floating \(3, E\) tensor, got torch.float32 \(2, 5\)",
        ),
        ({"reference_hidden": torch.zeros(3, 5).int()}, "reference_hidden: expected a floating"),
        (
            {"reference_weight": torch.zeros(VOCABULARY, 6)},
            r"reference_weight: expected a floating \(37, 5\) tensor",
        ),
        (
            {"reference_weight": torch.zeros(VOCABULARY, 5, device="meta")},
            "reference_weight: expected on cpu",
        ),
        ({"reference_bias": torch.zeros(3)}, r"reference_bias: expected \(37,\), got \(3,\)"),
        (
            {"reference_hidden": torch.zeros(3, 5).double()},
            "compute_dtype: expected one to be given",
        ),
        (
            {
                "reference_hidden": torch.zeros(3, 5).bfloat16(),
                "reference_weight": torch.zeros(VOCABULARY, 5).bfloat16(),
            },
            "compute_dtype: .* hidden is torch.float32, reference_hidden torch.bfloat16",
        ),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"softcap": 0.0}, "softcap: expected a positive number or None"),
        (
            {"max_buffer_bytes": 887, "backend": "torch"},
            "max_buffer_bytes: expected at least 888 .* got 887",
        ),
        ({"backend": "cuda"}, "backend: expected one of 'auto', 'reference', 'torch', .* 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden": torch.zeros(3, WIDTH),
        "weight": torch.zeros(VOCABULARY, WIDTH),
        "reference_hidden": torch.zeros(3, 5),
        "reference_weight": torch.zeros(VOCABULARY, 5),
        "targets": torch.zeros(3, dtype=torch.int64),
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        linear_kl(**arguments)
