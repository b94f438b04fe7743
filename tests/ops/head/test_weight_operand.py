"""A weight is rounded to its products' dtype once, for the calls of one step."""

import pytest
import torch
from torch import Tensor

from fastalign import fused_linear_sft_loss, linear_logprob
from fastalign.ops.head import products
from fastalign.ops.head.products import operand, weight_operand, weights_rounded_once

SHAPE = (39, 8)


def step(weight: Tensor) -> Tensor:
    """Two micro-batches; returns the weight's gradient."""
    generator = torch.Generator().manual_seed(0)
    weight.grad = None
    for _ in range(2):
        hidden = torch.randn(6, SHAPE[1], generator=generator)
        targets = torch.randint(SHAPE[0], (6,), generator=generator)
        loss, _ = fused_linear_sft_loss(hidden, weight, targets, compute_dtype=torch.bfloat16)
        logprob = linear_logprob(hidden, weight, targets, compute_dtype=torch.bfloat16)
        (loss + logprob.sum()).backward()
    assert weight.grad is not None
    return weight.grad.clone()


def test_one_cast_for_all_calls_and_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    casts: list[torch.Size] = []

    def counted(value: Tensor, *dtypes: torch.dtype) -> Tensor:
        casts.append(value.shape)
        return operand(value, *dtypes)

    monkeypatch.setattr(products, "operand", counted)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = step(weight)
    assert casts == [torch.Size(SHAPE)] * 6  # each forward's, and that of linear_logprob's backward
    casts.clear()
    with weights_rounded_once():
        found = step(weight)
    assert casts == [torch.Size(SHAPE)]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_that_changed_is_rounded_again(nested: bool) -> None:
    weight = torch.randn(SHAPE)
    with weights_rounded_once():
        first = weight_operand(weight, torch.bfloat16)
        assert weight_operand(weight, torch.bfloat16) is first
        if nested:
            with weights_rounded_once():
                assert weight_operand(weight, torch.bfloat16) is first
            assert weight_operand(weight, torch.bfloat16) is first
        weight.mul_(2.0)
        second = weight_operand(weight, torch.bfloat16)
        assert torch.equal(second, operand(weight, torch.bfloat16))
        assert not torch.equal(second, first)
        other = weight_operand(weight[1:], torch.bfloat16)
        assert other.shape == (38, 8)
    weight.data.fill_(3.0)  # behind PyTorch's back, but between two steps
    with weights_rounded_once():
        assert bool((weight_operand(weight, torch.bfloat16) == 3.0).all())


def test_weights_in_the_products_dtype_are_no_copies() -> None:
    weight = torch.randn(SHAPE)
    with weights_rounded_once():
        assert weight_operand(weight, torch.float32).data_ptr() == weight.data_ptr()
