"""`preference_loss` on a GPU: native and Triton against float64."""

import os

import pytest
import torch

from fastalign.ops.backends import unusable_reason
from tests.ops.preference_loss_cases import ALL_BOUNDS, eager, inputs, run
from tests.ops.test_preference_loss import CASES
from tests.tolerance import assert_no_worse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("FASTALIGN_TEST_GPU") != "1" or not torch.cuda.is_available(),
        reason="needs a GPU, and FASTALIGN_TEST_GPU=1 (scripts/gpu_check.sh)",
    ),
]
BOUNDS = {**ALL_BOUNDS, "many": [*range(0, 30_000, 7), 60_001, 60_002, 90_002]}


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize(("name", "ties"), CASES)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_values_and_gradients_are_no_worse_than_eager(
    backend: str, name: str, ties: bool, bounds: str
) -> None:
    reason = unusable_reason(backend, "cuda", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    pairs = inputs(name, BOUNDS[bounds], ties)
    found = run(name, pairs.to("cuda"), backend)
    again = run(name, pairs.to("cuda"), backend)
    plain, truth = eager(name, pairs, torch.float32), eager(name, pairs, torch.float64)
    for what, ours, same, theirs, true in zip(
        ("losses", "sequence_logprob", "gradient"), found, again, plain, truth, strict=True
    ):
        assert torch.equal(ours, same), what
        if (name, bounds) == ("orpo", "empty"):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            continue
        assert_no_worse(what, ours, theirs, true, dtype=torch.float32, length=1, scale=1.0)
