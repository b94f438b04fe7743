"""RMSNorm, gated activations and rotary embeddings in native code, against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from fastalign.ops import layers, native_library
from tests.tolerance import assert_no_worse

pytestmark = pytest.mark.skipif(
    native_library.unusable_reason("cpu") is not None, reason="the CPU library was not built"
)


def eager_norm(x: Tensor, weight: Tensor, offset: float, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * (weight + offset)


def eager_gate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh") * up


def eager_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


def values(function: Callable[..., Tensor], inputs: list[Tensor], num_grads: int) -> list[Tensor]:
    """The result and the gradients of the first inputs."""
    leaves = [x.detach().clone().requires_grad_(n < num_grads) for n, x in enumerate(inputs)]
    result = function(*leaves)
    torch.manual_seed(7)
    upstream = torch.randn(result.shape, dtype=torch.float64).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves[:num_grads], upstream)]


def compare(
    kernel: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    inputs: list[Tensor],
    num_grads: int,
    length: int,
) -> None:
    """The kernel's error is at most eager's."""
    ours, theirs = values(kernel, inputs, num_grads), values(eager, inputs, num_grads)
    wide = [x.double() for x in inputs]
    names = ["result", *(f"gradient {n}" for n in range(num_grads))]
    truths = values(eager, wide, num_grads)
    for name, our, their, truth in zip(names, ours, theirs, truths, strict=True):
        assert our.dtype == their.dtype, name
        scale = max(float(x.abs().max()) for x in (*wide, truth) if x.numel()) if our.numel() else 1
        assert_no_worse(name, our, their, truth, dtype=our.dtype, length=length, scale=scale)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 16), (130, 100), (2, 5000), (0, 8)])
def test_a_norm_is_as_exact_as_eager(isa: str, shape: tuple[int, ...], offset: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
    compare(
        lambda x, w: layers.rms_norm(x, w, offset, 1e-5),
        lambda x, w: eager_norm(x, w, offset, 1e-5),
        [x, weight],
        2,
        x.numel(),
    )


def test_an_epsilon_counts_and_a_row_of_zeros_is_finite(isa: str) -> None:
    x, weight = torch.tensor([[1e-3, -2e-3], [0.0, 0.0]]), torch.tensor([2.0, 3.0])
    found = values(lambda x, w: layers.rms_norm(x, w, 0.0, 1e-6), [x, weight], 2)
    expected = values(lambda x, w: eager_norm(x, w, 0.0, 1e-6), [x.double(), weight.double()], 2)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-6)


def test_the_weights_gradient_does_not_depend_on_the_threads() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3000, 96), torch.randn(96)
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(values(lambda x, w: layers.rms_norm(x, w, 0.0, 1e-6), [x, weight], 2))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for ours, theirs in zip(found[0], others, strict=True):
            assert torch.equal(ours, theirs)


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight = torch.randn(70, 12, requires_grad=True), torch.randn(12)
    layers.rms_norm(x, weight, 0.0, 1e-6).sum().backward()  # type: ignore[no-untyped-call]
    wide = x.detach().double().requires_grad_()
    eager_norm(wide, weight.double(), 0.0, 1e-6).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is None
    assert x.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", layers.FLOATS)
@pytest.mark.parametrize("shape", [(1,), (3, 37), (4, 2048), (0, 4)])
def test_a_gated_activation_is_as_exact_as_eager(
    isa: str, shape: tuple[int, ...], dtype: torch.dtype, activation: Any
) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(shape) * 4).to(dtype), torch.randn(shape).to(dtype)
    compare(
        lambda g, u: layers.gated_activation(g, u, activation),
        lambda g, u: eager_gate(g, u, activation),
        [gate, up],
        2,
        1,
    )


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_large_gates_and_what_is_no_number(isa: str, activation: Any) -> None:
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4, torch.nan])
    up = torch.ones(8)
    found = values(lambda g, u: layers.gated_activation(g, u, activation), [gate, up], 2)
    expected = values(lambda g, u: eager_gate(g, u, activation), [gate.double(), up.double()], 2)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtypes", ["float32 float32", "bfloat16 float32", "bfloat16 bfloat16"])
@pytest.mark.parametrize("head_dim", [2, 8, 64, 72])
def test_a_rotation_is_as_exact_as_eager(isa: str, head_dim: int, dtypes: str) -> None:
    torch.manual_seed(0)
    of_x, of_cos = (getattr(torch, name) for name in dtypes.split())
    x = torch.randn(2, 5, 3, head_dim).transpose(1, 2).to(of_x)  # (2, 3, 5, D)
    for batch in (1, 2):
        cos, sin = (torch.randn(batch, 5, head_dim).to(of_cos) for _ in range(2))
        assert layers.rotary_usable(x, cos, sin)
        compare(layers.rotary, eager_rotary, [x, cos, sin], 1, 2)
    found = layers.rotary(x, cos, sin)
    assert found.stride() == (x * cos[:, None]).stride()  # as what reads it had it


class Part(Tensor):
    """A tensor whose memory is not all of it."""


def test_what_the_kernels_do_not_compute() -> None:
    x, cos = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 8)
    assert layers.usable(x)
    assert layers.rotary_usable(x, cos, cos)
    assert not layers.usable(x.double())
    assert not layers.usable(x.to("meta"))
    assert not layers.usable(x.as_subclass(Part))  # as a shard is
    assert not layers.rotary_usable(x, cos[..., :4], cos[..., :4])  # of a part of the columns
    assert not layers.rotary_usable(x, cos.expand(2, 3, 8), cos.expand(2, 3, 8))
    assert not layers.rotary_usable(x, cos.clone().requires_grad_(), cos)
    assert not layers.rotary_usable(x[..., :7], cos[..., :7], cos[..., :7])


def test_an_estimate_sees_what_they_allocate() -> None:
    with FakeTensorMode(), torch.device("cpu"):
        x, weight = torch.empty(2, 3, 8, requires_grad=True), torch.empty(8, requires_grad=True)
        assert layers.usable(x, weight)
        y = layers.gated_activation(layers.rms_norm(x, weight, 0.0, 1e-6), x, "silu")
        heads = layers.rotary(y[:, None], torch.empty(1, 3, 8), torch.empty(1, 3, 8))
        heads.sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert weight.grad is not None
        assert weight.grad.shape == weight.shape
