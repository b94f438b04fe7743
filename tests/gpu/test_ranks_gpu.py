"""Runs whose models are shared on GPUs by NCCL: on one by FSDP2, on two where they are."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from fastalign.runs.config import config_to_dict
from fastalign.runs.folder import as_yaml
from fastalign.trainers import train_dpo
from tests.small_runs import _one_thread, dpo_config, folder, read_metrics

__all__ = ["_one_thread", "folder"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("FASTALIGN_TEST_GPU") != "1" or not torch.cuda.is_available(),
        reason="needs a GPU, and FASTALIGN_TEST_GPU=1 (scripts/gpu_check.sh)",
    ),
]
CASES = {
    "fsdp": (1, ("--parallel.strategy", "fsdp")),
    "fsdp, offloaded": (1, ("--parallel.strategy", "fsdp", "--parallel.offload")),
    "ddp, two": (2, ()),
    "fsdp, two": (2, ("--parallel.strategy", "fsdp")),
}


def config_of(folder: Path, run: str) -> Any:
    config = dpo_config(folder, run, device="cuda", precision="float32", tokens_per_batch=40)
    return replace(config, train=replace(config.train, max_steps=4))


@pytest.mark.parametrize("name", CASES)
def test_gpus_that_share_a_run_train_as_one_does(name: str, folder: Path) -> None:
    num_ranks, more = CASES[name]
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")
    train_dpo(config_of(folder, "one"))
    (folder / "run.yaml").write_text(as_yaml(config_to_dict(config_of(folder, "shared"))))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    command = ["-m", "fastalign", "dpo", "--config", str(folder / "run.yaml"), *more]
    done = subprocess.run([*torchrun, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = zip(read_metrics(folder / "one"), read_metrics(folder / "shared"), strict=True)
    for one, other in rows:
        for metric in ("loss", "grad_norm", "logps/chosen"):
            assert other[metric] == pytest.approx(one[metric], rel=1e-3)
