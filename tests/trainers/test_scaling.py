"""What arithmetic says of ranks is what two and three of them hold and send."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.trainers.parallel_config import ParallelConfig
from fastalign.trainers.scaling import (
    ModelWeights,
    Sharing,
    Traffic,
    Weight,
    gathered,
    kept,
    reducing,
    weights_of,
)
from fastalign.trainers.scaling_traffic import (
    PPOModelWeights,
    PPOWork,
    forward_traffic,
    gradient_traffic,
    ppo_traffic,
    sync_traffic,
)
from tests.tiny import put_adapter, tiny_model, tiny_reward_model
from tests.trainers.scaling_cases import CASES, HEAVY, Case

ROOT = Path(__file__).parents[2]
Found = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """By the number of ranks, what each counted: three processes for all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.trainers.scaling_worker", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [(folder / f"rank{rank}.log").open("w") for rank in range(3)]
    processes = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    told = "\n".join((folder / f"rank{rank}.log").read_text()[-2000:] for rank in range(3))
    assert codes == [0] * 3, told
    return {
        size: [json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)]
        for size in (2, 3)
    }


def sharing_of(case: Case, ranks: int) -> Sharing:
    return Sharing(ranks, 2 if case.precision == "bf16" else 4, ParallelConfig(**case.settings))


def model_of(case: Case) -> ModelWeights:
    model = tiny_model("llama")
    return weights_of(put_adapter(model, "q_proj", "down_proj") if case.adapter else model)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_and_sent_is_what_ranks_keep_and_send(
    name: str, ranks: int, found: Found
) -> None:
    case = CASES[name]
    model, sharing = model_of(case), sharing_of(case, ranks)
    counted = found[ranks][0][name]
    expected = kept(model, sharing)  # behind the last batch, no gradient is whole
    assert counted["weights"] == expected.weights
    assert counted["gradients"] == expected.gradients
    assert counted["states"] == expected.states
    traffic = gradient_traffic(model, sharing, case.batches)
    for of_rank in found[ranks]:
        assert {kind: of_rank[name][kind] for kind in vars(traffic)} == vars(traffic)
