"""`linear_kl`: how many matrix products it takes, and how much memory."""

from collections.abc import Callable

import pytest
import torch

from fastalign.ops import linear_kl
from tests.ops.head.linear_logprob.linear_logprob_cases import EAGER
from tests.products import matrix_product_flops, peak_bytes

ROWS, VOCABULARY, WIDTH = 192, 512, 4
UNIT = ROWS * VOCABULARY * WIDTH
ALL_LOGITS = 2 * ROWS * VOCABULARY * 4
THROUGH = ["logprob", "kl", "logprob+kl", "logprob+kl+entropy"]


def large_call(
    *, hidden: bool, weight: bool, budget: int | None, through: str = "logprob+kl"
) -> Callable[[], None]:
    """Forward and, if anything is trained, backward."""
    states = torch.randn(ROWS, WIDTH, requires_grad=hidden)
    head = torch.randn(VOCABULARY, WIDTH, requires_grad=weight)
    other = torch.randn(ROWS, WIDTH), torch.randn(VOCABULARY, WIDTH)
    targets = torch.arange(ROWS)

    def call() -> None:
        found = linear_kl(states, head, *other, targets, max_buffer_bytes=budget)
        if hidden or weight:
            total = sum(getattr(found, name).sum() for name in through.split("+"))
            total.backward()

    return call


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize(
    ("hidden", "weight", "kept", "others", "with_entropy"),
    [
        (False, False, 4, 4, (4, 4)),
        (True, False, 6, 8, (10, 14)),
        (False, True, 6, 10, (10, 10)),
        (True, True, 8, 12, (12, 12)),
    ],
)
def test_number_of_products(
    hidden: bool, weight: bool, kept: int, others: int, with_entropy: tuple[int, int], through: str
) -> None:
    if "entropy" in through:
        kept, others = with_entropy
    for budget, units in ((None, (kept, kept)), (ALL_LOGITS // 4, (kept, others))):
        call = large_call(hidden=hidden, weight=weight, budget=budget, through=through)
        found = matrix_product_flops(call) / UNIT
        if units[0] == units[1]:
            assert found == units[0]
        else:
            # about a fifth is kept
            share = (found - units[1]) / (units[0] - units[1])
            assert 0.1 < share < 0.3


def test_a_larger_budget_saves_products() -> None:
    found = [
        matrix_product_flops(large_call(hidden=True, weight=True, budget=ALL_LOGITS * n // 8))
        for n in (1, 4, 8, 16)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[1] > found[2] >= found[3]
    assert found[-1] == 8 * UNIT


@pytest.mark.parametrize("divisor", [32, 2])
@pytest.mark.parametrize(
    ("hidden", "weight", "through"),
    [
        (False, False, "kl"),
        (True, False, "logprob+kl"),
        (True, False, "logprob+kl+entropy"),
        (True, True, "logprob+kl"),
        (True, True, "logprob+kl+entropy"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_within_the_budget(
    hidden: bool, weight: bool, divisor: int, through: str, dtype: torch.dtype
) -> None:
    budget = ALL_LOGITS // divisor
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        call = large_call(hidden=hidden, weight=weight, budget=budget, through=through)
        call()  # leaves' .grad exist from now on
        peak = peak_bytes(call)
    # beside the buffers: gradients (and what they are added from), both brackets @ W, operands
    # rounded, and vectors of T elements
    beside = 4 * WIDTH * (6 * ROWS * hidden + 2 * VOCABULARY * weight) + 64 * ROWS
    # two heads' operands in bfloat16, and where no product takes those in float32 again
    beside += 2 * (2 + 4) * WIDTH * (ROWS + VOCABULARY) * (dtype == torch.bfloat16)
    assert peak <= budget + beside


def test_memory_of_the_definition_is_more() -> None:
    states = torch.randn(ROWS, WIDTH, requires_grad=True)
    head = torch.randn(VOCABULARY, WIDTH, requires_grad=True)

    def call() -> None:
        other = states.detach() + 1, head.detach()
        found = linear_kl(states, head, *other, torch.arange(ROWS), **EAGER)
        (found.logprob + found.kl).sum().backward()

    assert peak_bytes(call) > 2 * ALL_LOGITS
