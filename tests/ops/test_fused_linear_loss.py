"""`fused_linear_loss` against its eager definition: values, gradients, products, memory."""

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastalign.losses import segment_sum
from fastalign.ops.fused_linear_loss import LossFunction, TokenChunk, fused_linear_loss

ROWS, VOCABULARY, WIDTH = 21, 37, 8
IGNORED = (0, 6, 7, 20)
# The least for 37 float32 logits is 444 bytes: one row at a time, a few rows kept, all rows kept.
BUDGETS = [444, 1_500, 3_000, None]
EAGER: dict[str, Any] = {"backend": "reference"}

GROUPS: dict[str, list[int] | None] = {
    "rows": None,
    "even": [0, 3, 6, 9, 12, 15, 18, 21],
    "uneven": [0, 0, 1, 4, 4, 4, 16, 18, 21, 21],
    "one": [0, 21],
}

TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "logit_scale": {"logit_scale": 0.25},
    "temperature": {"temperature": 0.7},
    "row_temperature": {"temperature": torch.linspace(0.4, 2.5, ROWS, dtype=torch.float64)},
    "everything": {
        "softcap": 2.0,
        "logit_scale": 3.0,
        "temperature": torch.linspace(0.4, 2.5, ROWS, dtype=torch.float64),
    },
}


def leaves(
    dtype: torch.dtype, rows: int = ROWS, weight_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Hidden, weight and bias, all of which are trained."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((rows, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    dtypes = (dtype, weight_dtype or dtype, weight_dtype or dtype)
    return [value.to(d).requires_grad_() for value, d in zip(made, dtypes, strict=True)]


def some_targets(rows: int = ROWS, ignored: tuple[int, ...] = IGNORED) -> Tensor:
    targets = torch.arange(rows) * 5 % VOCABULARY
    targets[[row for row in ignored if row < rows]] = -100
    return targets


def group_loss(bounds: list[int] | None, rows: int = ROWS) -> LossFunction:
    """A loss that is not linear in the log-probs, and differs from group to group."""
    bounds = list(range(rows + 1)) if bounds is None else bounds
    num_groups = len(bounds) - 1

    def loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        inside = bounds[chunk.group_start : chunk.group_stop + 1]
        assert (inside[0], inside[-1]) == (chunk.row_start, chunk.row_stop)
        sums = segment_sum(chunk.logprob, torch.tensor(inside) - chunk.row_start)
        share = torch.linspace(-1.0, 2.0, num_groups, dtype=sums.dtype)
        losses = torch.nn.functional.softplus(0.3 * sums + 2.0).square()
        metrics = {
            "logprob": chunk.logprob.sum(),
            "entropy": chunk.entropy.sum(),
            "correct": chunk.is_argmax.sum(),
            "targets": chunk.is_target.sum(),
        }
        return (losses * share[chunk.group_start : chunk.group_stop]).sum(), metrics

    return loss_fn


def outputs(
    values: list[Tensor], targets: Tensor, bounds: list[int] | None, **options: Any
) -> dict[str, Tensor]:
    """The loss, the metrics, and the gradient of each trained leaf."""
    hidden, weight, *bias = values
    loss, metrics = fused_linear_loss(
        hidden,
        weight,
        targets,
        bounds,
        group_loss(bounds, targets.numel()),
        bias=bias[0] if bias else None,
        **options,
    )
    trained = {n: v for n, v in zip("hwb", values, strict=False) if v.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return {"loss": loss.detach(), **metrics, **dict(zip(trained, gradients, strict=True))}


def assert_all_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], ulps: float = 64
) -> None:
    assert found.keys() == expected.keys()
    for name, one in found.items():
        other = expected[name]
        assert one.dtype == other.dtype, name
        epsilon = torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0
        slack = ulps * epsilon * max(1.0, largest(other))
        torch.testing.assert_close(one, other, rtol=0, atol=slack, msg=lambda m, n=name: f"{n} {m}")


def largest(value: Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0


def recorded(call: Callable[[], object]) -> list[Any]:
    """What the profiler saw inside `call`."""
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True
    ) as seen:
        call()
    return sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())


def matrix_product_flops(call: Callable[[], object]) -> int:
    """FLOPs of the matrix products in `call`."""
    total = 0
    for event in recorded(call):
        if event.name() in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = event.shapes()[event.name() != "aten::mm" :][:2]
            total += 2 * left[0] * left[1] * right[1]
        assert "bmm" not in event.name()
        assert "einsum" not in event.name()
    return total


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that `call` held at one time, beyond what was held before."""
    sizes = [event.nbytes() for event in recorded(call) if event.name() == "[memory]"]
    return max(accumulate(sizes))


# --- against the definition ---------------------------------------------------------------------


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


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(
    dtype: torch.dtype, groups: str, transform: str, budget: int | None
) -> None:
    values, targets, options = leaves(dtype), some_targets(), TRANSFORMS[transform]
    if budget is not None and dtype == torch.float64:
        budget *= 2
    found = outputs(values, targets, GROUPS[groups], max_buffer_bytes=budget, **options)
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


# --- what the loss function sees ----------------------------------------------------------------


def spans_seen(bounds: list[int] | None, budget: int | None) -> list[tuple[int, int, int, int]]:
    hidden, weight, _ = leaves(torch.float32)
    seen = []

    def loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append((chunk.row_start, chunk.row_stop, chunk.group_start, chunk.group_stop))
        assert chunk.logprob.shape == (chunk.row_stop - chunk.row_start,)
        assert chunk.logprob.requires_grad
        assert chunk.logprob.is_leaf
        assert not chunk.entropy.requires_grad
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


# --- the backward -------------------------------------------------------------------------------


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


# --- low precision ------------------------------------------------------------------------------


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
        if one.dtype == dtype:  # half a unit of the gradient's own rounding
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


# --- rows and groups ----------------------------------------------------------------------------


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
        fused_linear_loss(*arguments, max_buffer_bytes=443)
    with pytest.raises(ValueError, match="backend: expected 'auto', 'torch' or 'reference'"):
        fused_linear_loss(*arguments, backend="native")  # type: ignore[arg-type]


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


# --- products and memory ------------------------------------------------------------------------

LARGE_ROWS, LARGE_VOCABULARY, LARGE_WIDTH = 192, 512, 4
UNIT = LARGE_ROWS * LARGE_VOCABULARY * LARGE_WIDTH
ALL_LOGITS = LARGE_ROWS * LARGE_VOCABULARY * 4


def large_call(
    *, hidden: bool, weight: bool, budget: int | None, num_groups: int = 48, **options: Any
) -> Callable[[], None]:
    states = torch.randn(LARGE_ROWS, LARGE_WIDTH, requires_grad=hidden)
    head = torch.randn(LARGE_VOCABULARY, LARGE_WIDTH, requires_grad=weight)
    bounds = list(range(0, LARGE_ROWS + 1, LARGE_ROWS // num_groups))

    def call() -> None:
        loss, _ = fused_linear_loss(
            states,
            head,
            torch.arange(LARGE_ROWS),
            bounds,
            lambda chunk: (chunk.logprob.sum(), {"entropy": chunk.entropy.sum()}),
            max_buffer_bytes=budget,
            **options,
        )
        if hidden or weight:
            loss.backward()

    return call


@pytest.mark.parametrize("budget", [ALL_LOGITS // 8, None])
@pytest.mark.parametrize(
    ("hidden", "weight", "units"), [(False, False, 2), (True, False, 4), (True, True, 6)]
)
def test_number_of_products(hidden: bool, weight: bool, units: int, budget: int | None) -> None:
    call = large_call(hidden=hidden, weight=weight, budget=budget)
    assert matrix_product_flops(call) == units * UNIT


@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_a_group_larger_than_the_budget_is_partly_computed_again(divisor: int) -> None:
    call = large_call(hidden=True, weight=True, budget=ALL_LOGITS // divisor, num_groups=1)
    found = matrix_product_flops(call) / UNIT
    # what is kept is less than the budget's share of the rows, by the working tile
    assert 8 - 2 / divisor < found < 8 - 1 / divisor


@pytest.mark.parametrize("num_groups", [48, 1])
@pytest.mark.parametrize("divisor", [32, 4, 1])
@pytest.mark.parametrize(("hidden", "weight"), [(False, False), (True, False), (True, True)])
def test_memory_stays_within_the_budget(
    hidden: bool, weight: bool, divisor: int, num_groups: int
) -> None:
    budget = ALL_LOGITS // divisor
    call = large_call(hidden=hidden, weight=weight, budget=budget, num_groups=num_groups)
    call()  # leaves' .grad exist from now on
    # beside the buffers: gradients (and what they are added from), and vectors of T elements
    beside = 4 * LARGE_WIDTH * (4 * LARGE_ROWS * hidden + 2 * LARGE_VOCABULARY * weight)
    beside += 40 * LARGE_ROWS
    assert peak_bytes(call) <= budget + beside


def test_memory_of_the_definition_is_more() -> None:
    assert peak_bytes(large_call(hidden=True, weight=True, budget=None, **EAGER)) > 2 * ALL_LOGITS
