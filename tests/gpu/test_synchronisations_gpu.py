"""A step waits for its GPU once, where it reads its numbers: CUDA says of every other wait."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastalign import fused_linear_dpo_loss, fused_linear_sft_loss
from fastalign.runs import accumulate
from tests.runs.read_cases import STEPS
from tests.small_runs import folder

__all__ = ["folder"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("FASTALIGN_TEST_GPU") != "1" or not torch.cuda.is_available(),
        reason="needs a GPU, and FASTALIGN_TEST_GPU=1 (scripts/gpu_check.sh)",
    ),
]


@pytest.mark.parametrize("packing", ["shared_prefix", "padded"])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_once(
    folder: Path, name: str, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, _ = STEPS[name](folder, packing, "cuda")
    take()  # kernels are compiled and loaded by the first call
    plain, reads = accumulate.read_numbers, []

    def read_numbers(values: Sequence[Tensor]) -> list[float]:
        torch.cuda.set_sync_debug_mode("default")
        if values:
            reads.append(len(values))
        found = plain(values)
        torch.cuda.set_sync_debug_mode("error")
        return found

    monkeypatch.setattr(accumulate, "read_numbers", read_numbers)
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(reads) == 1
    assert metrics["num_micro_batches"] > 2


def test_a_drop_in_with_targets_of_the_host_does_not_wait() -> None:
    hidden = torch.randn(12, 16, device="cuda", requires_grad=True)
    weight = torch.randn(40, 16, device="cuda", requires_grad=True)
    targets = torch.arange(12)
    targets[[0, 5]] = -100
    bounds = torch.tensor([0, 6, 12])

    def both(labels: Tensor) -> Tensor:
        reference = torch.zeros(2, device="cuda")
        dpo, _ = fused_linear_dpo_loss(hidden, weight, labels, bounds, reference)
        sft, _ = fused_linear_sft_loss(hidden, weight, labels)
        return dpo + sft

    expected = both(targets.cuda())
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = both(targets)
        found.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
