"""`linear_logprob` against its eager definition: values, gradients, products, memory."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastalign.ops.linear_logprob import linear_logprob
from fastalign.ops.linear_logprob.op import linear_logprob_forward

ROWS, VOCABULARY, WIDTH = 21, 37, 8
IGNORED = (0, 6, 7, 20)
# The least for 37 float32 logits is 444 bytes: one row at a time, a few rows kept, all rows kept.
BUDGETS = [444, 3_000, None]
EAGER: dict[str, Any] = {"backend": "reference"}

TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "logit_scale": {"logit_scale": 0.25},
    "temperature": {"temperature": 0.7},
    "row_temperature": {"temperature": torch.linspace(0.4, 2.5, ROWS, dtype=torch.float64)},
    "one_element_temperature": {"temperature": torch.tensor(1.6)},
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


def clones(values: list[Tensor]) -> list[Tensor]:
    return [value.detach().clone().requires_grad_(value.requires_grad) for value in values]


def outputs(values: list[Tensor], targets: Tensor, through: str, **options: Any) -> list[Tensor]:
    """Log-prob, entropy, and the gradient of each trained leaf through what `through` names."""
    hidden, weight, *bias = values
    logprob, entropy = linear_logprob(
        hidden, weight, targets, bias=bias[0] if bias else None, return_entropy=True, **options
    )
    coefficients = torch.linspace(-1.0, 2.0, 2 * targets.numel(), dtype=logprob.dtype)
    upstream = dict(zip(("logprob", "entropy"), coefficients.chunk(2), strict=True))
    read = {"logprob": logprob, "entropy": entropy}
    total = sum((read[name] * upstream[name]).sum() for name in through.split("+"))
    trained = [value for value in values if value.requires_grad]
    return [logprob.detach(), entropy.detach(), *torch.autograd.grad(total, trained)]


def assert_all_close(found: list[Tensor], expected: list[Tensor], ulps: float = 64) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype, index
        slack = ulps * torch.finfo(one.dtype).eps * max(1.0, largest(other))
        torch.testing.assert_close(one, other, rtol=0, atol=slack, msg=lambda m, i=index: f"{i}{m}")


def largest(value: Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0


def recorded(call: Callable[[], object]) -> list[Any]:
    """What the profiler saw inside `call`, inner parts of our own operations included."""
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


# --- the definition -----------------------------------------------------------------------------


def test_reference_is_what_torch_says() -> None:
    hidden, weight, bias = leaves(torch.float64)
    targets = some_targets()
    temperature = torch.linspace(0.4, 2.5, ROWS, dtype=torch.float64)
    logprob, entropy = linear_logprob(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=2.0,
        logit_scale=0.5,
        return_entropy=True,
        **EAGER,
    )
    logits = torch.nn.functional.linear(hidden, weight, bias) * 0.5
    logits = 2.0 * torch.tanh(logits / 2.0) / temperature[:, None]
    expected = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(logprob, expected, rtol=0, atol=1e-14)
    expected = torch.distributions.Categorical(logits=logits).entropy() * (targets != -100)
    torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_by_finite_differences(backend: str) -> None:
    values = [value.detach()[:5].clone().requires_grad_() for value in leaves(torch.float64)]
    targets = torch.tensor([4, -100, 0, 2, 1])

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=0.8,
            softcap=3.0,
            logit_scale=0.5,
            return_entropy=True,
            max_buffer_bytes=500,
            backend=backend,
        )

    assert torch.autograd.gradcheck(call, values)


# --- against the definition ---------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("through", ["logprob", "entropy", "logprob+entropy"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(
    dtype: torch.dtype, transform: str, through: str, budget: int | None
) -> None:
    values, targets, options = leaves(dtype), some_targets(), TRANSFORMS[transform]
    if budget is not None and dtype == torch.float64:
        budget *= 2
    found = outputs(values, targets, through, max_buffer_bytes=budget, **options)
    assert_all_close(found, outputs(values, targets, through, **options, **EAGER))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("through", ["logprob", "logprob+entropy"])
@pytest.mark.parametrize("trained", ["h", "w", "b", "hw", "hb", "wb"])
def test_any_subset_may_be_trained(trained: str, through: str, budget: int | None) -> None:
    values, targets = leaves(torch.float32), some_targets()
    for name, value in zip("hwb", values, strict=True):
        value.requires_grad_(name in trained)
    found = outputs(values, targets, through, max_buffer_bytes=budget, softcap=2.0)
    assert_all_close(found, outputs(values, targets, through, softcap=2.0, **EAGER))


@pytest.mark.parametrize("trained", ["hw", "h"])
def test_without_a_bias(trained: str) -> None:
    values, targets = leaves(torch.float32)[:2], some_targets()
    values[1].requires_grad_("w" in trained)
    found = outputs(values, targets, "logprob", max_buffer_bytes=3_000)
    assert_all_close(found, outputs(values, targets, "logprob", **EAGER))


@pytest.mark.parametrize("with_entropy", [True, False])
def test_without_gradients(with_entropy: bool) -> None:
    hidden, weight, bias = leaves(torch.float32)
    targets = some_targets()
    options = {"bias": bias, "return_entropy": with_entropy}
    with torch.no_grad():
        found = linear_logprob(hidden, weight, targets, **options, max_buffer_bytes=3_000)
        expected = linear_logprob(hidden, weight, targets, **options, **EAGER)
    if not with_entropy:
        found, expected = (found,), (expected,)
    assert not any(value.requires_grad for value in found)
    assert_all_close(list(found), list(expected))


def test_log_probs_alone_have_the_same_gradient() -> None:
    values, targets = leaves(torch.float32), some_targets()
    hidden, weight, bias = values
    logprob = linear_logprob(hidden, weight, targets, bias=bias)
    coefficients = torch.linspace(-1.0, 2.0, 2 * ROWS)[:ROWS]
    found = [logprob.detach(), *torch.autograd.grad((logprob * coefficients).sum(), values)]
    expected = outputs(values, targets, "logprob", **EAGER)
    assert_all_close(found, [expected[0], *expected[2:]])


@pytest.mark.parametrize("retained", [True, False])
def test_backward_runs_as_often_as_asked(retained: bool) -> None:
    hidden, weight, _ = leaves(torch.float32)
    total = linear_logprob(hidden, weight, some_targets()).sum()
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=retained)
    if retained:
        second = torch.autograd.grad(total, (hidden, weight))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    else:
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(total, (hidden, weight))


# --- low precision ------------------------------------------------------------------------------


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
    for one, worse, true, expected in zip(found, eager, truth, expected_dtypes, strict=True):
        assert one.dtype == expected
        slack = 16 * torch.finfo(torch.float32).eps * largest(true)
        if expected == dtype:  # half a unit of the gradient's own rounding
            slack += torch.finfo(dtype).eps / 2 * largest(true)
        assert largest(one.double() - true) <= largest(worse.double() - true) + slack
    # what is rounded is the operands: nothing after them is
    for one, true in zip(found[:2], truth[:2], strict=True):
        assert largest(one.double() - true) <= 16 * torch.finfo(torch.float32).eps * largest(true)


def test_master_weight_is_rounded_for_the_products_only() -> None:
    values, targets = leaves(torch.float32), some_targets()
    rounded = [value.detach().bfloat16().float().requires_grad_() for value in values[:2]]
    found = outputs(values[:2], targets, "logprob", compute_dtype=torch.bfloat16)
    assert_all_close(found, outputs(rounded, targets, "logprob", **EAGER))
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


# --- rows, strides, tied weights ----------------------------------------------------------------


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


# --- registration -------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["", "h", "hwb"])
def test_registration(trained: str) -> None:
    needs = [name in trained for name in "hwb"]
    values = [
        v.detach().requires_grad_(n) for v, n in zip(leaves(torch.float32), needs, strict=True)
    ]
    inputs = (some_targets(), torch.tensor([0.7]))
    for budget in (3_000, None):
        torch.library.opcheck(
            linear_logprob_forward,
            (*values, *inputs, 2.0, 0.5, -100, torch.float32, budget, needs, True),
        )


def test_traced_by_the_compiler() -> None:
    values, targets = leaves(torch.float32), some_targets()
    compiled = torch.compile(linear_logprob, backend="aot_eager", fullgraph=True)
    hidden, weight, bias = clones(values)
    compiled(hidden, weight, targets, bias=bias).sum().backward()
    expected = clones(values)
    linear_logprob(expected[0], expected[1], targets, bias=expected[2]).sum().backward()
    assert_all_close([v.grad for v in (hidden, weight, bias)], [v.grad for v in expected])


# --- wrong arguments ----------------------------------------------------------------------------


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
        ({"temperature": torch.ones(2)}, r"temperature: expected a number or \(3,\)"),
        ({"temperature": torch.ones(3, requires_grad=True)}, "temperature: expected no gradient"),
        ({"softcap": 0.0}, "softcap: expected a positive number or None"),
        ({"logit_scale": -1.0}, "logit_scale: expected a positive number"),
        ({"compute_dtype": torch.int64}, "compute_dtype: expected bfloat16"),
        ({"compute_dtype": torch.float8_e4m3fn}, "compute_dtype: expected bfloat16"),
        ({"hidden": torch.zeros(3, WIDTH).bfloat16()}, "compute_dtype: expected one to be given"),
        ({"max_buffer_bytes": 443}, "max_buffer_bytes: expected at least 444 .* got 443"),
        ({"backend": "triton"}, "backend: expected 'auto', 'torch' or 'reference'"),
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


# --- products and memory ------------------------------------------------------------------------

LARGE_ROWS, LARGE_VOCABULARY, LARGE_WIDTH = 192, 512, 4
UNIT = LARGE_ROWS * LARGE_VOCABULARY * LARGE_WIDTH
ALL_LOGITS = LARGE_ROWS * LARGE_VOCABULARY * 4


def large_call(
    *, hidden: bool, weight: bool, budget: int | None, entropy: str = "none"
) -> Callable[[], None]:
    """Forward and, if anything is trained, backward; `entropy` is none, read or differentiated."""
    states = torch.randn(LARGE_ROWS, LARGE_WIDTH, requires_grad=hidden)
    head = torch.randn(LARGE_VOCABULARY, LARGE_WIDTH, requires_grad=weight)
    targets = torch.arange(LARGE_ROWS)

    def call() -> None:
        if entropy == "none":
            total = linear_logprob(states, head, targets, max_buffer_bytes=budget).sum()
        else:
            logprob, value = linear_logprob(
                states, head, targets, max_buffer_bytes=budget, return_entropy=True
            )
            total = (logprob + value if entropy == "differentiated" else logprob).sum()
        if hidden or weight:
            total.backward()

    return call


@pytest.mark.parametrize("entropy", ["none", "read", "differentiated"])
@pytest.mark.parametrize("budget", [ALL_LOGITS // 8, None])
@pytest.mark.parametrize(
    ("hidden", "weight", "units"), [(False, False, 2), (True, False, 4), (True, True, 6)]
)
def test_number_of_products(
    hidden: bool, weight: bool, units: int, budget: int | None, entropy: str
) -> None:
    call = large_call(hidden=hidden, weight=weight, budget=budget, entropy=entropy)
    found = matrix_product_flops(call) / UNIT
    if entropy == "differentiated" and hidden:
        # all logits again; and the direction that the frozen head took along is of no use then
        assert found == units + (2 if weight else 4)
    elif weight and budget is not None:
        assert 7 < found < 8  # about an eighth is kept
    else:
        assert found == units


def test_a_larger_budget_saves_products() -> None:
    found = [
        matrix_product_flops(large_call(hidden=True, weight=True, budget=ALL_LOGITS * n // 8))
        for n in (1, 4, 8, 16)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[1] > found[2] >= found[3]
    assert found[-1] == 6 * UNIT


@pytest.mark.parametrize("entropy", ["none", "read", "differentiated"])
@pytest.mark.parametrize("divisor", [32, 4, 1])
@pytest.mark.parametrize(("hidden", "weight"), [(False, False), (True, False), (True, True)])
def test_memory_stays_within_the_budget(
    hidden: bool, weight: bool, divisor: int, entropy: str
) -> None:
    budget = ALL_LOGITS // divisor
    call = large_call(hidden=hidden, weight=weight, budget=budget, entropy=entropy)
    call()  # leaves' .grad exist from now on
    # beside the buffers: gradients (and what they are added from), and vectors of T elements
    beside = 4 * LARGE_WIDTH * (4 * LARGE_ROWS * hidden + 2 * LARGE_VOCABULARY * weight)
    beside += 32 * LARGE_ROWS
    assert peak_bytes(call) <= budget + beside


def test_memory_of_the_definition_is_more() -> None:
    states = torch.randn(LARGE_ROWS, LARGE_WIDTH, requires_grad=True)
    head = torch.randn(LARGE_VOCABULARY, LARGE_WIDTH, requires_grad=True)

    def call() -> None:
        linear_logprob(states, head, torch.arange(LARGE_ROWS), **EAGER).sum().backward()

    assert peak_bytes(call) > 2 * ALL_LOGITS
