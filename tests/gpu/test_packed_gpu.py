"""`kl_penalty` and `gae` on a GPU: native and Triton against float64."""

import os

import pytest
import torch

from fastalign.ops import gae, kl_penalty
from tests.ops.kl_penalty_cases import ESTIMATORS, inputs, run
from tests.ops.packed_cases import LENGTHS, require
from tests.ops.test_gae import NUMBERS, assert_rounded_once, loop
from tests.ops.test_gae import inputs as gae_inputs
from tests.tolerance import assert_no_worse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("FASTALIGN_TEST_GPU") != "1" or not torch.cuda.is_available(),
        reason="needs a GPU, and FASTALIGN_TEST_GPU=1 (scripts/gpu_check.sh)",
    ),
]
LONG = [*LENGTHS, [10_000, 1, 1023, 1024, 1025, 4097, 3]]


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("lengths", LONG, ids=str)
def test_gae(backend: str, lengths: list[int], numbers: tuple[float, float]) -> None:
    require(backend, "cuda")
    given = gae_inputs(lengths)
    reward, value, bounds, bootstrap = (tensor.cuda() for tensor in given)
    options = dict(zip(("gamma", "gae_lambda"), numbers, strict=True))
    for following in (None, bootstrap):
        found = gae(reward, value, bounds, bootstrap_value=following, backend=backend, **options)
        truth = loop(*given[:3], None if following is None else given[3], *numbers)
        for name, ours, true in zip(("advantage", "returns"), found, truth, strict=True):
            assert_rounded_once(name, ours.cpu(), true)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_gae_of_tensors_that_do_not_begin_at_16_bytes(backend: str) -> None:
    require(backend, "cuda")
    reward, value, bounds, _ = gae_inputs([3000, 77])
    moved = [torch.cat([tensor[:1], tensor]).cuda()[1:] for tensor in (reward, value)]
    found = gae(*moved, bounds.cuda(), backend=backend)
    for name, ours, true in zip(
        ("advantage", "returns"), found, loop(reward, value, bounds, None, 1.0, 0.95), strict=True
    ):
        assert_rounded_once(name, ours.cpu(), true)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("lengths", LONG, ids=str)
def test_kl_penalty(backend: str, lengths: list[int], estimator: str, everything: bool) -> None:
    require(backend, "cuda")
    given = inputs(lengths, everything=everything)
    found = run(given.to(torch.float32, "cuda"), estimator, backend)
    eager = run(given, estimator, None)
    for name, true in run(given.to(torch.float64), estimator, None).items():
        length = max(lengths, default=1) if name == "sequence_kl" else 1
        assert_no_worse(
            name,
            found[name].cpu(),
            eager[name],
            true,
            dtype=torch.float32,
            length=length,
            scale=3.0,
        )


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_score_without_a_token_is_seen(backend: str) -> None:
    require(backend, "cuda")
    logprob, bounds = torch.zeros(3).cuda(), torch.tensor([0, 2, 2, 3]).cuda()
    found = kl_penalty(
        logprob, logprob, bounds, torch.ones(3).cuda(), coefficient=0.1, backend=backend
    )
    assert found.sequence_kl.isnan().tolist() == [False, True, False]
    assert found.reward.tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_gpu_is_not_waited_for(backend: str) -> None:
    require(backend, "cuda")
    reward, value, bounds, bootstrap = (tensor.cuda() for tensor in gae_inputs([5, 40]))
    given = inputs([5, 40]).to(torch.float32, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        gae(reward, value, bounds, bootstrap_value=bootstrap, backend=backend)
        kl_penalty(**vars(given), estimator="k3", backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
