"""On two ranks: an engine on each of them, or one that rank 0 drives for all."""

from pathlib import Path

from tests.rank_processes import run
from tests.rollouts import distributed_worker
from tests.rollouts.vllm_cases import needs_vllm


@needs_vllm
def test_two_ranks_with_engines_of_their_own_and_with_one_engine(tmp_path: Path) -> None:
    outputs = run(2, tmp_path / "logs", distributed_worker.main)
    assert all(f"rank {rank} is done" in output for rank, output in enumerate(outputs))
