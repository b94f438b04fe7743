"""Ranks that hold shards of a policy sample it by one engine, which rank 0 drives."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastalign.trainers import train_ppo
from tests import rank_processes as ranks
from tests.ranks.test_ranks import FSDP, lora
from tests.rollouts.vllm_cases import needs_vllm
from tests.small_runs import read_metrics
from tests.trainers.sampling.test_vllm_runs import DIFFERENCE, vllm_config


@needs_vllm
@pytest.mark.parametrize("change", [lambda config: config, lora], ids=["whole", "adapter"])
def test_ranks_sample_by_one_engine(folder: Path, change: Callable[[Any], Any]) -> None:
    shared = change(vllm_config(folder, "shared", max_steps=3))
    ranks.run(2, folder / "logs", train_ppo, replace(shared, parallel=FSDP))
    rows = read_metrics(folder / "shared")
    assert [row["sampling/policy_version"] for row in rows] == [0, 1, 2]
    assert max(row[DIFFERENCE] for row in rows) < 1e-4
    assert all(row["time/sync_seconds"] > 0 for row in rows)
