"""Float32 products by oneDNN on a CPU: those of linear layers, and those of a head."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fastalign.ops import float32_products
from fastalign.ops.head import products

pytestmark = pytest.mark.skipif(not torch._C._has_mkldnn, reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def every_product_is_onednns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    calls: list[tuple[int, int]] = []
    plain = float32_products.onednn_product

    def counted(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append((left.numel() // left.shape[-1], right.shape[0]))
        return plain(left, right, bias)

    monkeypatch.setattr(float32_products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(float32_products, "MIN_OPERATIONS", 1000)
    for module in (float32_products, products):
        monkeypatch.setattr(module, "onednn_product", counted)
    return calls


def close(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    scale = expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_and_its_gradients(
    bias: bool, every_product_is_onednns: list[tuple[int, int]]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24, bias=bias))
    truth = copy.deepcopy(model).double()
    float32_products.use_fastest_products(model)
    model = copy.deepcopy(model)
    value, gradient = torch.randn(3, 10, 40), torch.randn(3, 10, 24)
    inputs = [value.clone().requires_grad_(), value.double().requires_grad_()]
    for each, leaf in zip((model, truth), inputs, strict=True):
        output = each(leaf)
        output.backward(gradient.to(output.dtype))
        close(output, truth(inputs[1]))
    close(inputs[0].grad, inputs[1].grad)
    for mine, other in zip(model.parameters(), truth.parameters(), strict=True):
        close(mine.grad, other.grad)
    assert every_product_is_onednns == [(30, 24), (30, 40), (24, 40)]
    with torch.no_grad():
        close(model(value), truth(value.double()))
    assert every_product_is_onednns.pop() == (30, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(value).dtype == torch.bfloat16
    model.requires_grad_(False)(inputs[0]).sum().backward()
    model(value[0, :1])
    assert every_product_is_onednns[3:] == [(30, 24), (30, 40)], "no weight's, no small ones"


@pytest.mark.parametrize("shape", [(700, 20), (20, 700)])
def test_a_heads_product_is_written_or_added_in_strips(
    shape: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    every_product_is_onednns: list[tuple[int, int]],
) -> None:
    monkeypatch.setattr(products, "ONEDNN_ELEMENTS", 100)
    torch.manual_seed(0)
    left, right = torch.randn(33, shape[0]).t(), torch.randn(33, shape[1])
    out = torch.full((shape[0], shape[1] + 3), torch.nan)[:, : shape[1]]
    products.product(left, right, out)
    expected = left.double() @ right.double()
    close(out, expected)
    products.add_product(left, right, out)
    close(out, 2 * expected)
    assert len(every_product_is_onednns) == 2 * 3
