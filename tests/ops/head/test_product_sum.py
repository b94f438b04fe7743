"""A weight's gradient: one product rounded at once, or a sum that is rounded at its end."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastalign.ops.head import products
from fastalign.ops.head.products import ProductSum, product, product_dtype

V, N, K = 37, 11, 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _strips_of_four_rows_and_memory_of_nans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(products, "MIN_STRIP_ROWS", 4)
    monkeypatch.setitem(products.STRIP_ELEMENTS, "cpu", 1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(N, V, generator=generator).to(dtype).t()
    right = torch.randn(N, K, generator=generator).to(dtype)
    low = product_dtype(dtype, "cpu")
    return left.to(low), right.to(low)


def in_float32(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    sums = [torch.empty(V, K) for _ in pairs]
    for (left, right), out in zip(pairs, sums, strict=True):
        product(left, right, out)
    return torch.stack(sums).sum(0)


@pytest.mark.parametrize("leaf", DTYPES)
def test_one_product_is_rounded_once(leaf: torch.dtype) -> None:
    found = ProductSum(torch.zeros(V, K, dtype=leaf), torch.bfloat16, single=True)
    found.add(*operands(0))
    assert torch.equal(found.result(), in_float32(operands(0)).to(leaf))


@pytest.mark.parametrize("scale", [1.0, 1 / 3, -65_536.0])
@pytest.mark.parametrize("leaf", DTYPES)
def test_several_are_added_in_float32_and_multiplied_before_they_are_rounded(
    leaf: torch.dtype, scale: float
) -> None:
    found = ProductSum(torch.zeros(V, K, dtype=leaf), torch.bfloat16, single=False)
    for seed in (0, 1):
        found.add(*operands(seed))
    factor = torch.tensor(scale)
    exact = in_float32(operands(0), operands(1)) * factor
    # the second product is added by each library in an order of its own
    slack = 8 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    result = found.result(factor)
    assert result.dtype == leaf
    ulp = torch.finfo(leaf).eps * exact.abs() / 2
    inside = exact.abs() < torch.finfo(leaf).max
    assert ((result.float() - exact).abs() <= ulp + slack + 2.0**-25)[inside].all()


@pytest.mark.parametrize("single", [True, False])
def test_no_product_and_the_shape_of_a_bias(single: bool) -> None:
    leaf = torch.zeros(V, dtype=torch.bfloat16)
    found = ProductSum(leaf, torch.bfloat16, single=single)
    assert torch.equal(found.result(), leaf)
    left, right = operands(2)
    found.add(left, right[:, :1])
    expected = torch.empty(V, 1)
    product(left, right[:, :1], expected)
    assert torch.equal(found.result(), expected[:, 0].bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_is_not_rounded_to_the_rows_dtype(dtype: torch.dtype) -> None:
    rows = torch.linspace(-3, 3, 60).view(12, 5).to(dtype)
    expected = (rows.double() * torch.tensor(1 / 3).double()).to(dtype)
    found = products.multiplied(rows.clone(), torch.tensor(1 / 3), dtype)
    assert (found.double() - expected.double()).abs().max() <= torch.finfo(dtype).eps / 2
    assert (found == expected).double().mean() > 0.9
    assert torch.equal(products.multiplied(rows.clone(), None, torch.float32), rows.float())
