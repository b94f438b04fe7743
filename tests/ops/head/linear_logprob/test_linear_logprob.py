"""`linear_logprob`: values and gradients."""

import pytest
import torch
from torch import Tensor

from fastalign.ops.head.linear_logprob import linear_logprob
from tests.ops.head.fused_linear_loss.fused_linear_loss_cases import combined
from tests.ops.head.linear_logprob.linear_logprob_cases import (
    BUDGETS,
    EAGER,
    KERNELS,
    ROWS,
    TRANSFORMS,
    assert_all_close,
    leaves,
    outputs,
    skip_unusable,
    some_targets,
)


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


@pytest.mark.parametrize(
    ("backend", "dtype", "transform", "through", "budget"),
    combined(KERNELS, TRANSFORMS, ["logprob", "entropy", "logprob+entropy"], BUDGETS),
)
def test_values_and_gradients(
    backend: str, dtype: torch.dtype, transform: str, through: str, budget: int | None
) -> None:
    skip_unusable(backend, dtype)
    values, targets, options = leaves(dtype), some_targets(), TRANSFORMS[transform]
    if budget is not None and dtype == torch.float64:
        budget *= 2
    found = outputs(values, targets, through, max_buffer_bytes=budget, backend=backend, **options)
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
