"""`token_logprob` on a GPU: native and Triton against float64."""

import os

import pytest
import torch

from fastalign import token_logprob
from fastalign.ops.backends import unusable_reason
from tests.ops.test_token_logprob import CASES, DTYPES, Case, eager, inputs
from tests.tolerance import assert_no_worse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("FASTALIGN_TEST_GPU") != "1" or not torch.cuda.is_available(),
        reason="needs a GPU, and FASTALIGN_TEST_GPU=1 (scripts/gpu_check.sh)",
    ),
]
SHAPES = [(1, 1), (5, 63), (33, 2000), (4, 128_256), (3, 128_257)]


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_no_worse_than_eager(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, case: Case
) -> None:
    reason = unusable_reason(backend, "cuda", dtype)
    if reason is not None:
        pytest.skip(reason)
    logits, targets = inputs(shape, dtype)
    leaf = logits.cuda().requires_grad_()
    arguments = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in case.arguments(len(targets)).items()
    }
    logprob, entropy = token_logprob(
        leaf, targets.cuda(), return_entropy=True, backend=backend, **arguments
    )
    weights = torch.linspace(-1, 1, len(targets), device="cuda")
    (logprob * weights + 0.3 * entropy * weights.flip(0)).sum().backward()
    found = (logprob.detach().cpu(), entropy.detach().cpu(), leaf.grad.cpu())
    plain, truth = eager(logits, targets, case), eager(logits.double(), targets, case)
    for name, ours, theirs, true in zip(
        ("logprob", "entropy", "gradient"), found, plain, truth, strict=True
    ):
        rounded = dtype if name == "gradient" else torch.float32
        assert_no_worse(name, ours, theirs, true, dtype=rounded, length=shape[1], scale=20.0)
