"""Under torchrun: an engine on each rank, or one that rank 0 drives for all."""

import os
import subprocess
import sys
from pathlib import Path

from tests.rollouts.vllm_cases import needs_vllm


@needs_vllm
def test_two_ranks_with_engines_of_their_own_and_with_one_engine() -> None:
    root = Path(__file__).parents[2]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "tests.rollouts.distributed_worker"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "rank 0 is done" in said
    assert "rank 1 is done" in said
