"""Ranks that are not beside the missing one in a ring name it too, and no other."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.errors import RANK_FAILED, RankFailed
from fastalign.ranks.failure import record_collectives, watched_by_ranks
from fastalign.ranks.world import open_world, world_of_environment
from tests import rank_processes

SIZE, MISSING = 5, 2


def sums(how: str, timeout_seconds: float) -> None:
    """Sum in a loop, in which one rank is killed, stopped, or ends by an error of its own."""
    world = world_of_environment()
    config = ParallelConfig(silence_seconds=2)
    try:
        with (
            open_world(world, timeout_seconds=timeout_seconds),
            watched_by_ranks(world, config),
        ):
            for step in range(4):
                if world.rank == MISSING and step == 3:
                    if how == "error":
                        raise KeyError("of its own")
                    os.kill(os.getpid(), getattr(signal, how))
                dist.all_reduce(torch.ones(64))
    except RankFailed as error:
        print(error, flush=True)
        os._exit(RANK_FAILED)
    except KeyError:
        os._exit(1)


@pytest.mark.parametrize(
    ("how", "code", "problem", "timeout_seconds"),
    [
        ("SIGKILL", -signal.SIGKILL, "is gone", 600),
        ("error", 1, "ended: 'of its own'", 600),
        ("SIGSTOP", -signal.SIGKILL, "has not answered for 2 seconds", 6),
    ],
)
def test_every_other_rank_names_the_missing_one_alone(
    how: str, code: int, problem: str, timeout_seconds: float, tmp_path: Path
) -> None:
    start = time.monotonic()
    started = rank_processes.start(SIZE, tmp_path / "logs", sums, how, timeout_seconds)
    others = [rank for rank in range(SIZE) if rank != MISSING]
    for rank in others:
        started.processes[rank].join(120)
    assert time.monotonic() - start < 120
    started.processes[MISSING].kill()
    codes = started.join()
    outputs = [started.output(rank) for rank in others]
    assert codes == [code if rank == MISSING else RANK_FAILED for rank in range(SIZE)], outputs
    pid = started.processes[MISSING].pid
    for rank, output in zip(others, outputs, strict=True):
        assert f"rank {rank}: rank {MISSING} of {SIZE} (" in output
        assert f", {pid}) {problem}" in output
        assert output.count(f" of {SIZE} (") == 1


def test_the_flight_recorder_writes_into_the_run_folder_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    record_collectives(tmp_path)
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/flight-recorder.rank"
