"""`linear_kl`: values and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.ops import linear_kl, linear_logprob, token_kl
from tests.ops.head.linear_kl.linear_kl_cases import BUDGETS, DIRECTIONS, outputs, reference_head
from tests.ops.head.linear_logprob.linear_logprob_cases import (
    EAGER,
    KERNELS,
    ROWS,
    TRANSFORMS,
    VOCABULARY,
    assert_all_close,
    leaves,
    skip_unusable,
    some_targets,
)

THROUGH = ["logprob", "kl", "logprob+kl", "logprob+kl+entropy"]
FLOAT = torch.float32
# some rows kept with every transform, where it is exact; the kernels see them all in test_kl_tile
CASES = [("torch", torch.float64, name, BUDGETS[1]) for name in TRANSFORMS]
CASES += [
    (backend, dtype, "everything", budget)
    for backend, dtype in KERNELS
    for budget in (BUDGETS[1:2] if backend == "triton" else BUDGETS)
]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reference_is_what_torch_says(direction: str) -> None:
    (hidden, weight, bias), other = leaves(torch.float64), reference_head(torch.float64)
    targets = some_targets()
    temperature = torch.linspace(0.4, 2.5, ROWS, dtype=torch.float64)
    found = linear_kl(
        hidden,
        weight,
        other[0],
        other[1],
        targets,
        direction=direction,
        bias=bias,
        reference_bias=other[2],
        temperature=temperature,
        softcap=2.0,
        logit_scale=0.5,
        **EAGER,
    )
    log_probs = []
    for head in ((hidden, weight, bias), other):
        logits = torch.nn.functional.linear(*head) * 0.5
        logits = 2.0 * torch.tanh(logits / 2.0) / temperature[:, None]
        log_probs.append(logits.log_softmax(-1))
    kept = targets != -100
    for logprob, log_p in ((found.logprob, log_probs[0]), (found.reference_logprob, log_probs[1])):
        expected = -torch.nn.functional.nll_loss(log_p, targets, reduction="none")
        torch.testing.assert_close(logprob, expected, rtol=0, atol=1e-14)
    entropy = torch.distributions.Categorical(logits=log_probs[0]).entropy() * kept
    torch.testing.assert_close(found.entropy, entropy, rtol=0, atol=1e-14)
    # kl_div(input, target) is KL(target || input)
    own, of = log_probs if direction == "reverse" else log_probs[::-1]
    kl = torch.nn.functional.kl_div(of, own, reduction="none", log_target=True).sum(-1) * kept
    torch.testing.assert_close(found.kl, kl, rtol=0, atol=1e-14)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_by_finite_differences(backend: str, direction: str) -> None:
    values = [value.detach()[:3].clone().requires_grad_() for value in leaves(torch.float64)]
    other = [value[:3] for value in reference_head(torch.float64)]

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        found = linear_kl(
            hidden,
            weight,
            *other[:2],
            torch.tensor([2, -100, 0]),
            direction=direction,
            bias=bias,
            temperature=0.8,
            softcap=3.0,
            logit_scale=0.5,
            max_buffer_bytes=900,
            backend=backend,
        )
        return found.logprob, found.entropy, found.kl

    assert torch.autograd.gradcheck(call, values)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("backend", "dtype", "transform", "budget"), CASES)
def test_values_and_gradients(
    backend: str, dtype: torch.dtype, transform: str, budget: int | None, direction: str
) -> None:
    skip_unusable(backend, dtype)
    values, other, targets = leaves(dtype), reference_head(dtype), some_targets()
    options: dict[str, Any] = {"direction": direction, **TRANSFORMS[transform]}
    if budget is not None and dtype == torch.float64:
        budget *= 2
    for through in THROUGH[2:]:
        run = {"max_buffer_bytes": budget, "backend": backend, **options}
        found = outputs(values, other, targets, through, **run)
        expected = outputs(values, other, targets, through, **options, **EAGER)
        assert_all_close(found, expected, ulps=128)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("through", THROUGH[:3])
@pytest.mark.parametrize("trained", ["h", "w", "b", "hw", "hb", "wb"])
def test_any_subset_may_be_trained(trained: str, through: str, budget: int | None) -> None:
    values, other, targets = leaves(FLOAT), reference_head(FLOAT), some_targets()
    for name, value in zip("hwb", values, strict=True):
        value.requires_grad_(name in trained)
    found = outputs(values, other, targets, through, max_buffer_bytes=budget, softcap=2.0)
    assert_all_close(found, outputs(values, other, targets, through, softcap=2.0, **EAGER))


@pytest.mark.parametrize("trained", ["hw", "h"])
def test_without_biases(trained: str) -> None:
    values, other, targets = leaves(FLOAT)[:2], reference_head(FLOAT)[:2], some_targets()
    values[1].requires_grad_("w" in trained)
    found = outputs(values, other, targets, "logprob+kl", max_buffer_bytes=5_000)
    assert_all_close(found, outputs(values, other, targets, "logprob+kl", **EAGER))


def test_without_gradients() -> None:
    values, other, targets = leaves(FLOAT), reference_head(FLOAT), some_targets()
    options = {"bias": values[2], "reference_bias": other[2]}
    with torch.no_grad():
        found = linear_kl(*values[:2], *other[:2], targets, **options, max_buffer_bytes=5_000)
        expected = linear_kl(*values[:2], *other[:2], targets, **options, **EAGER)
    assert not any(value.requires_grad for value in found)
    assert_all_close(list(found), list(expected))


@pytest.mark.parametrize("budget", BUDGETS)
def test_it_says_what_the_single_operations_say(budget: int | None) -> None:
    (hidden, weight, bias), other, targets = leaves(FLOAT), reference_head(FLOAT), some_targets()
    options = {"softcap": 3.0, "temperature": 0.7}
    budgeted = {"max_buffer_bytes": budget, **options}
    found = linear_kl(hidden, weight, *other[:2], targets, bias=bias, **budgeted)
    expected = linear_logprob(hidden, weight, targets, bias=bias, return_entropy=True, **budgeted)
    assert_all_close([found.logprob, found.entropy], list(expected))
    logprob = linear_logprob(*other[:2], targets, **budgeted)
    assert_all_close([found.reference_logprob], [logprob])
    logits = torch.nn.functional.linear(hidden, weight, bias)
    kl = token_kl(logits, other[0] @ other[1].t(), ignored=targets == -100, **options)
    assert_all_close([found.kl], [kl])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("backend", "dtype"), [k for k in KERNELS if k[0] != "triton"])
def test_equal_heads_have_no_kl_and_no_gradient(
    backend: str, dtype: torch.dtype, direction: str, budget: int | None
) -> None:
    skip_unusable(backend, dtype)
    values, targets = leaves(dtype), some_targets()
    options = {"max_buffer_bytes": budget and 2 * budget, "softcap": 5.0, "temperature": 0.7}
    found = outputs(values, values, targets, "kl", direction=direction, backend=backend, **options)
    assert torch.equal(found[0], found[1])
    assert not any(value.any() for value in found[3:])


def test_kl_is_never_negative_and_the_directions_mirror() -> None:
    (hidden, weight, _), other = leaves(FLOAT), reference_head(FLOAT)[:2]
    near = (hidden.detach() + 1e-4, weight.detach())
    targets = torch.arange(ROWS)
    for reference in (near, other):
        reverse = linear_kl(hidden, weight, *reference, targets)
        mirrored = linear_kl(*reference, hidden, weight, targets, direction="forward")
        assert (reverse.kl >= 0).all()
        assert_all_close([reverse.kl.detach()], [mirrored.kl], ulps=16)


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_reference_is_a_constant_even_where_it_is_the_policy(budget: int | None) -> None:
    hidden, weight, _ = leaves(FLOAT)
    other = torch.tanh(hidden)  # depends on what is trained
    targets = some_targets()
    found = outputs(
        [hidden, weight], [other, weight], targets, "logprob+kl", max_buffer_bytes=budget
    )
    fixed = [other.detach(), weight.detach().clone()]
    assert_all_close(found, outputs([hidden, weight], fixed, targets, "logprob+kl", **EAGER))
    frozen = linear_kl(hidden.detach(), weight.detach(), other, weight, targets)
    assert not any(value.requires_grad for value in frozen)


@pytest.mark.parametrize("trained", ["hw", "h"])
def test_backward_runs_as_often_as_asked(trained: str) -> None:
    (hidden, weight, _), other = leaves(FLOAT), reference_head(FLOAT)
    weight.requires_grad_("w" in trained)
    leaf = [value for value in (hidden, weight) if value.requires_grad]
    found = linear_kl(hidden, weight, *other[:2], some_targets(), max_buffer_bytes=5_000)
    total = (found.logprob + 0.5 * found.kl).sum()
    first = torch.autograd.grad(total, leaf, retain_graph=True)
    second = torch.autograd.grad(total, leaf)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_banned_tokens(backend: str, direction: str, budget: int | None) -> None:
    skip_unusable(backend, FLOAT)
    values, other = leaves(FLOAT), reference_head(FLOAT)
    ban = torch.zeros(VOCABULARY)
    ban[1] = -torch.inf
    targets = some_targets()
    targets[targets == 1] = 2
    options = {"direction": direction, "max_buffer_bytes": budget, "backend": backend}
    banned = (values[2].detach() + ban).requires_grad_()
    both = outputs(
        [*values[:2], banned], [*other[:2], other[2] + ban], targets, "logprob+kl", **options
    )
    assert all(value.isfinite().all() for value in both)
    assert not both[5][1].any()
    policy = outputs([*values[:2], banned], other, targets, "logprob+kl", **options)
    reference = outputs(values, [*other[:2], other[2] + ban], targets, "logprob+kl", **options)
    finite, infinite = (policy, reference) if direction == "reverse" else (reference, policy)
    assert all(value.isfinite().all() for value in finite)
    assert infinite[3][targets != -100].isinf().all()
    assert infinite[4][targets != -100].isnan().all()
    assert not infinite[4][targets == -100].any()
    unasked = outputs(values, [*other[:2], other[2] + ban], targets, "logprob+entropy", **options)
    assert all(value.isfinite().all() for value in unasked[4:])
