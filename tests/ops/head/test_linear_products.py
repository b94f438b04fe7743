"""The bfloat16 product of the CPU library: accumulated and returned in float32."""

import itertools

import pytest
import torch
from torch import Tensor

from fastalign.ops import native_library
from fastalign.ops.head.products import add_product, product, product_dtype

pytestmark = pytest.mark.skipif(
    product_dtype(torch.bfloat16, "cpu") != torch.bfloat16,
    reason="needs the CPU library and AVX-512 with bfloat16 instructions",
)
# Around the borders of vectors (16), tiles (8 x 48; AMX: 32 x 32, 32 deep), pairs of k, blocks (256
# rows, 1,024 deep; AMX: 640).
SIZES = [
    (1, 1, 1),
    (5, 7, 3),
    (8, 48, 2),
    (9, 49, 1025),
    (300, 100, 33),
    (257, 1, 2049),
    (13, 500, 64),
    (33, 31, 641),
]


@pytest.fixture(params=["best", "avx512"], autouse=True)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take AMX where the processor has it, then the instructions that others have."""
    if request.param == "avx512" and not native_library.has_amx():
        pytest.skip("the best instructions here are AVX-512's")
    monkeypatch.setenv("FASTALIGN_CPU_ISA", request.param)


def operands(rows: int, columns: int, depth: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + columns + depth)
    left = torch.randn(rows, depth, generator=generator).bfloat16()
    return left, torch.randn(depth, columns, generator=generator).bfloat16()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_shape_and_layout(size: tuple[int, int, int]) -> None:
    left, right = operands(*size)
    exact = left.double() @ right.double()
    # products of bfloat16 are exact in float32: what is left is the rounding of their sum
    allowed = 4 * torch.finfo(torch.float32).eps * (left.double().abs() @ right.double().abs())
    for turned in itertools.product((False, True), repeat=2):
        a, b = (
            m.t().contiguous().t() if t else m for m, t in zip((left, right), turned, strict=True)
        )
        out = torch.full(exact.shape, torch.nan)
        product(a, b, out)
        assert ((out - exact).abs() <= allowed).all()
        add_product(a, b, out)
        assert ((out - 2 * exact).abs() <= 2 * allowed).all()


def test_strides_beyond_the_matrix_and_what_lies_beside_the_result() -> None:
    left, right = operands(37, 75, 130)
    wide = torch.full((37, 200), torch.nan).bfloat16()
    wide[:, 8:138] = left
    out = torch.full((37, 80), 7.0)
    product(wide[:, 8:138], right, out[:, :75])
    expected = torch.empty(37, 75)
    product(left, right, expected)
    assert torch.equal(out[:, :75], expected)
    assert torch.equal(out[:, 75:], torch.full((37, 5), 7.0))


@pytest.mark.parametrize("columns", [4160, 4150], ids=["whole vectors", "a part of one"])
def test_a_result_larger_than_the_caches_is_the_same(columns: int) -> None:
    left, right = operands(520, columns, 33)
    large, shifted = torch.full((520, 4160), 7.0), torch.full((520, 4161), 7.0)
    product(left, right, large[:, :columns])  # written past the caches: more than 8 MB, aligned
    product(left, right, shifted[:, 1 : columns + 1])  # not aligned
    assert torch.equal(large[:, :columns], shifted[:, 1 : columns + 1])
    assert (large[:, columns:] == 7.0).all()


def test_no_unit_stride() -> None:
    left, right = operands(20, 30, 40)
    out, expected = torch.empty(20, 30), torch.empty(20, 30)
    product(left.repeat_interleave(2, 0)[::2].repeat_interleave(2, 1)[:, ::2], right, out)
    product(left, right, expected)
    assert torch.equal(out, expected)


def test_an_empty_sum_is_zero() -> None:
    out = torch.full((3, 5), torch.nan)
    product(torch.zeros(3, 0).bfloat16(), torch.zeros(0, 5).bfloat16(), out)
    assert not out.any()


def test_the_number_of_threads_changes_nothing() -> None:
    left, right = operands(300, 700, 65)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            out = torch.empty(300, 700)
            product(left, right, out)
            results.append(out)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_another_instruction_set_promotes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTALIGN_CPU_ISA", "avx2")
    assert product_dtype(torch.bfloat16, "cpu") == torch.float32
