"""`fused_linear_loss`: how rows are cut into chunks, and what one chunk leaves for the backward."""

import pytest
import torch

from fastalign.ops import native_library
from fastalign.ops.head.buffers import Budget, default_budget
from fastalign.ops.head.footprint import footprint
from fastalign.ops.head.fused_linear_loss import fused_linear_loss
from fastalign.ops.head.fused_linear_loss.chunked import balanced_capacity, group_chunks
from fastalign.ops.head.products import product, product_dtype
from tests.products import peak_bytes

LLAMA_COLUMNS, LLAMA_WIDTH = 128_256, 4_096


def budget_of(device: str, columns: int, dtype: torch.dtype, limit: int | None = None) -> Budget:
    where = torch.device(device)
    if limit is None:
        limit = default_budget(columns, dtype, where, within_free_memory=False)
    return Budget(columns, dtype, where, limit, "native", save=True, convert=True)


def test_chunks_are_equal_where_the_largest_would_leave_a_low_tile() -> None:
    budget, bounds = budget_of("cuda", LLAMA_COLUMNS, torch.bfloat16), [*range(0, 8193, 1024)]
    most = budget.most_saved_rows(8192)
    assert list(group_chunks(bounds, most)) == [(0, 5), (5, 8)]
    assert budget.plan(most).tile_rows == 256
    for groups in (bounds, range(8193)):
        rows = balanced_capacity(groups, most)
        assert rows == 4096
    assert budget.plan(rows).tile_rows == 1024


@pytest.mark.parametrize(
    ("bounds", "capacity", "expected"),
    [
        ([0, 10, 20, 30, 40], 30, [(0, 2), (2, 4)]),
        ([0, 10, 20, 30, 40], 40, [(0, 4)]),
        ([0, 33, 66, 99, 132, 140], 132, [(0, 2), (2, 5)]),
        ([0, 100, 110, 120], 100, [(0, 1), (1, 3)]),  # no lower than a group that fits
        ([0, 100, 110, 120, 130], 20, [(0, 1), (1, 3), (3, 4)]),  # a group that never fits
        ([0, 0, 5, 5], 3, [(0, 1), (1, 2), (2, 3)]),
        ([0], 4, []),
        (range(101), 60, [(0, 60), (60, 100)]),  # whole blocks would be 64 rows, more than fit
        (range(129), 96, [(0, 64), (64, 128)]),
    ],
)
def test_balanced_chunks(bounds: list[int], capacity: int, expected: list[tuple[int, int]]) -> None:
    assert list(group_chunks(bounds, balanced_capacity(bounds, capacity))) == expected


def test_an_8b_heads_call_takes_a_gigabyte_less_than_with_a_float32_gradient() -> None:
    budget = budget_of("cuda", LLAMA_COLUMNS, torch.bfloat16)
    found = footprint(budget, 4096, LLAMA_WIDTH, torch.bfloat16)
    tile, brackets = 1024 * LLAMA_COLUMNS * 4, 4096 * LLAMA_COLUMNS * 2
    assert (found.num_chunks, found.tile_rows) == (1, 1024)
    weight = LLAMA_COLUMNS * LLAMA_WIDTH
    # before: tile, brackets and a float32 gradient; then that gradient and its bfloat16 copy
    assert max(tile + brackets + 4 * weight, 6 * weight) - found.peak > 2**30
    assert found.held < 4 * weight - 2**29


WIDE = (64, 256, 4_096)  # T, D, V: the weight's gradient is larger than its brackets


@pytest.mark.parametrize("limit", [2**24, 2**18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_footprint_is_what_a_call_allocates(dtype: torch.dtype, limit: int) -> None:
    reason = native_library.unusable_reason("cpu")
    if reason is not None or product_dtype(dtype, "cpu") != dtype:
        pytest.skip(reason or "operands are promoted to float32 here")
    rows, width, columns = WIDE
    found = footprint(budget_of("cpu", columns, dtype, limit), rows, width, dtype)
    assert (found.num_chunks == 1) == (limit == 2**24)
    hidden, weight = (torch.randn(n, width).to(dtype).requires_grad_() for n in (rows, columns))
    targets = torch.arange(rows)

    def call() -> None:
        loss, _ = fused_linear_loss(
            hidden,
            weight,
            targets,
            None,
            lambda chunk: (chunk.logprob.sum(), {}),
            max_buffer_bytes=limit,
            backend="native",
        )
        torch.autograd.grad(loss, (hidden, weight))

    call()
    vectors = 64 * rows
    brackets, value = (torch.zeros(rows, n, dtype=dtype) for n in (columns, width))
    out = torch.zeros(columns, width, dtype=dtype)
    # scratch of a library's product, and a strip that it returns
    library = peak_bytes(lambda: product(brackets.t(), value, out))
    assert found.peak - vectors <= peak_bytes(call) <= found.peak + vectors + library


def test_rows_that_change_before_the_backward_are_noticed() -> None:
    hidden = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(9, 4, requires_grad=True)
    inner = hidden * 1.0
    loss, _ = fused_linear_loss(
        inner, weight, torch.arange(6), None, lambda chunk: (chunk.logprob.sum(), {})
    )
    inner.detach().mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
