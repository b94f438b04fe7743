"""`fused_linear_loss`: how many matrix products it takes, and how much memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.ops.head.fused_linear_loss import TokenChunk, fused_linear_loss
from fastalign.ops.head.products import product_dtype
from tests.ops.head.fused_linear_loss.fused_linear_loss_cases import EAGER
from tests.products import matrix_product_flops, peak_bytes

LARGE_ROWS, LARGE_VOCABULARY, LARGE_WIDTH = 192, 512, 4
UNIT = LARGE_ROWS * LARGE_VOCABULARY * LARGE_WIDTH
ALL_LOGITS = LARGE_ROWS * LARGE_VOCABULARY * 4


def large_call(
    *,
    hidden: bool,
    weight: bool,
    budget: int | None,
    num_groups: int = 48,
    dtype: torch.dtype = torch.float32,
    of_entropy: bool = False,
    **options: Any,
) -> Callable[[], None]:
    states = torch.randn(LARGE_ROWS, LARGE_WIDTH, dtype=dtype, requires_grad=hidden)
    head = torch.randn(LARGE_VOCABULARY, LARGE_WIDTH, dtype=dtype, requires_grad=weight)
    bounds = list(range(0, LARGE_ROWS + 1, LARGE_ROWS // num_groups))

    def loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        entropy = chunk.entropy.sum()
        return chunk.logprob.sum() + (entropy if of_entropy else 0.0), {"entropy": entropy}

    def call() -> None:
        loss, _ = fused_linear_loss(
            states,
            head,
            torch.arange(LARGE_ROWS),
            bounds,
            loss_fn,
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
    # what is kept is less than the budget's share of the rows, by the tile; an eighth is not kept
    assert 8 - 2 / divisor < found < 8 - 1 / divisor if divisor < 8 else found == 8


def test_a_loss_of_entropies_takes_one_product_more() -> None:
    call = large_call(hidden=True, weight=True, budget=None, of_entropy=True)
    assert matrix_product_flops(call) == 8 * UNIT


@pytest.mark.parametrize("of_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_groups", [48, 1])
@pytest.mark.parametrize("divisor", [32, 4, 1])
@pytest.mark.parametrize(("hidden", "weight"), [(False, False), (True, False), (True, True)])
def test_memory_stays_within_the_budget(
    hidden: bool,
    weight: bool,
    divisor: int,
    num_groups: int,
    dtype: torch.dtype,
    of_entropy: bool,
) -> None:
    if product_dtype(dtype, "cpu") != dtype:
        pytest.skip("operands are promoted to float32 here, in copies beside the budget")
    budget = ALL_LOGITS // divisor
    options = {"num_groups": num_groups, "dtype": dtype, "of_entropy": of_entropy}
    call = large_call(hidden=hidden, weight=weight, budget=budget, **options)
    call()  # leaves' .grad exist from now on
    # beside the buffers: gradients (and what they are added from), and vectors of T elements
    beside = 4 * LARGE_WIDTH * (4 * LARGE_ROWS * hidden + 2 * LARGE_VOCABULARY * weight)
    beside += 40 * LARGE_ROWS
    assert peak_bytes(call) <= budget + beside


def test_memory_of_the_definition_is_more() -> None:
    assert peak_bytes(large_call(hidden=True, weight=True, budget=None, **EAGER)) > 2 * ALL_LOGITS
