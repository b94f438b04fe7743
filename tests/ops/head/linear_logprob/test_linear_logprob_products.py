"""`linear_logprob`: how many matrix products it takes, and how much memory."""

from collections.abc import Callable

import pytest
import torch

from fastalign.ops.head.linear_logprob import linear_logprob
from tests.ops.head.linear_logprob.linear_logprob_cases import (
    EAGER,
)
from tests.products import matrix_product_flops, peak_bytes

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
        assert found == 8  # an eighth is not worth keeping
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
