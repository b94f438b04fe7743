"""`token_kl`, `linear_kl` and its pass over tiles on a GPU: native and Triton against float64."""

import os
from dataclasses import replace

import pytest
import torch

from fastalign.ops import token_kl
from fastalign.ops.backends import unusable_reason
from fastalign.ops.head.kl_tile import PairStatistics
from tests.ops.head.head_tile.test_head_tile import transform_of
from tests.ops.head.linear_kl.linear_kl_cases import outputs, reference_head
from tests.ops.head.linear_logprob.linear_logprob_cases import EAGER, largest, leaves, some_targets
from tests.ops.head.test_kl_tile import products
from tests.ops.head.test_kl_tile import run as run_tile
from tests.ops.test_token_kl import COMBINATIONS, Case, eager, inputs
from tests.tolerance import assert_no_worse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("FASTALIGN_TEST_GPU") != "1" or not torch.cuda.is_available(),
        reason="needs a GPU, and FASTALIGN_TEST_GPU=1 (scripts/gpu_check.sh)",
    ),
]
SHAPES = [(1, 1), (5, 63), (33, 2000), (4, 128_256), (3, 128_257)]


@pytest.fixture(params=["native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = unusable_reason(request.param, "cuda", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.mark.parametrize(("case", "dtypes"), COMBINATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_token_kl_is_no_worse_than_eager(
    backend: str, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], case: Case
) -> None:
    logits, reference = inputs(shape, dtypes)
    arguments = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in case.arguments(len(logits)).items()
    }
    for equal in (False, True):
        other = logits.float() if equal else reference
        leaf = logits.cuda().requires_grad_()
        kl = token_kl(leaf, other.cuda(), backend=backend, **arguments)
        (kl * torch.linspace(-1, 1, len(leaf), device="cuda")).sum().backward()
        found = (kl.detach().cpu(), leaf.grad.cpu())
        plain, truth = eager(logits, other, case), eager(logits.double(), other.double(), case)
        for name, ours, theirs, true in zip(("kl", "gradient"), found, plain, truth, strict=True):
            rounded = dtypes[0] if name == "gradient" else torch.float32
            assert_no_worse(name, ours, theirs, true, dtype=rounded, length=shape[1], scale=20.0)
        assert not (equal and (found[0].any() or found[1].any()))


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("over_reference", [False, True])
@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("shape", [(9, 257), (4, 128_256), (3, 128_257)], ids=str)
def test_the_pass_over_two_tiles(
    backend: str, shape: tuple[int, int], name: str, over_reference: bool, combined: bool
) -> None:
    tiles, targets, ignored = products(*shape)
    transform = transform_of(name, shape[0])
    on_cpu = (targets, ignored, transform, over_reference)
    plain, plain_gradient = run_tile(tiles.clone(), *on_cpu, combined=combined)
    true, true_gradient = run_tile(tiles.double(), *on_cpu, combined=combined)
    if transform.temperature is not None:
        transform = replace(transform, temperature=transform.temperature.cuda())
    on_gpu = (targets.cuda(), ignored.cuda(), transform, over_reference, backend)
    for dtype in (torch.float32, torch.bfloat16):
        place = None
        if dtype != torch.float32:
            place = torch.full(true_gradient.shape, torch.nan, dtype=dtype, device="cuda")
        read, gradient = run_tile(tiles.cuda(), *on_gpu, combined=combined, place=place)
        compared = [(*values, torch.float32) for values in zip(read, plain, true, strict=True)]
        compared.append((gradient, plain_gradient.to(dtype), true_gradient, dtype))
        names = (*PairStatistics._fields, "gradient")
        for value, (ours, theirs, truth, rounded) in zip(names, compared, strict=True):
            assert_no_worse(
                value, ours.cpu(), theirs, truth, dtype=rounded, length=shape[1], scale=30.0
            )


@pytest.mark.parametrize("budget", [888, 5_000, None])
@pytest.mark.parametrize("through", ["kl", "logprob+kl", "logprob+kl+entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_kl(backend: str, dtype: torch.dtype, through: str, budget: int | None) -> None:
    values, other, targets = leaves(dtype), reference_head(dtype), some_targets()
    exact = [value.detach().double().requires_grad_() for value in values]
    truth = outputs(exact, [v.double() for v in other], targets, through, **EAGER)
    on_gpu = [value.detach().cuda().requires_grad_() for value in values]
    run = {"max_buffer_bytes": budget and 2 * budget, "backend": backend}
    found = outputs(on_gpu, [value.cuda() for value in other], targets.cuda(), through, **run)
    for index, (one, true) in enumerate(zip(found, truth, strict=True)):
        # a gradient's products have bfloat16 brackets where the operands are bfloat16
        eps = torch.finfo(dtype if index >= 4 else torch.float32).eps
        assert largest(one.cpu().double() - true) <= 64 * eps * max(1.0, largest(true))
