"""pytest-benchmark suite of the head: `pytest benchmarks/`."""

import pytest
import torch

from benchmarks.heads import (
    CASES,
    DEFAULT_CASES,
    IMPLEMENTATIONS,
    HeadCase,
    forward_backward,
    make_inputs,
    products,
)
from benchmarks.peers import usable_peers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SOME_CASES = [CASES[name] for name in DEFAULT_CASES["dpo-loss", DEVICE]]
FUNCTIONS = {
    name: {**functions, **usable_peers(name, DEVICE)[0]}
    for name, functions in IMPLEMENTATIONS.items()
}
CALLS = [(name, key) for name, functions in FUNCTIONS.items() for key in functions]


@pytest.mark.parametrize("case", SOME_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("name", "implementation"), CALLS)
def test_head(benchmark, case: HeadCase, name: str, implementation: str) -> None:
    """Time a forward and backward pass after checking it against the eager one."""
    inputs = make_inputs(case, DEVICE, DTYPE)
    function = FUNCTIONS[name][implementation]
    truth = forward_backward(IMPLEMENTATIONS[name]["eager"], inputs)
    torch.testing.assert_close(forward_backward(function, inputs), truth, rtol=3e-2, atol=0)
    benchmark.group = f"{name} {case.name} {DTYPE}"
    benchmark.pedantic(forward_backward, (function, inputs), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("case", SOME_CASES, ids=lambda case: case.name)
def test_products(benchmark, case: HeadCase) -> None:
    """Time the bare matrix products that the heads are compared with."""
    inputs = make_inputs(case, DEVICE, DTYPE)
    benchmark.group = f"products {case.name} {DTYPE}"
    benchmark.pedantic(products, (inputs,), rounds=3, warmup_rounds=1)
