"""Runs killed at a random moment, gone on with, and compared with a run that was not.

Each trainer's run is killed by SIGKILL once before a random file operation, or once inside a random
line of Python that it executes; some are killed a second time while they go on.
"""

import os
import random
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from fastalign.ranks.world import ALONE
from fastalign.runs.checkpoint.writer import CHECKPOINTS
from fastalign.runs.config import config_to_dict
from fastalign.runs.folder import as_yaml
from tests import rank_processes as ranks
from tests.ranks.test_ranks import TRAINERS
from tests.runs.checkpoint.checkpoint_killer import kill_before
from tests.runs.test_resume_everywhere import NUM_STEPS, STEPS, assert_same_end

SAVES = {"save_every": 1, "keep_checkpoints": NUM_STEPS}
KILLED = -signal.SIGKILL
MOST_OPERATIONS = 150  # that change the disk, in a run of five steps
MOST_CALLS = 400_000  # of Python functions, from the beginning of the command


def kill_in_call(number: int) -> None:
    """This process dies when it calls its Python function of that number."""
    left = number

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def run_alone(arguments: list[str], folder: Path, operation: int, call: int) -> None:
    """`fastalign ...` as one process without torchrun, which dies as it is told; 0: it lives."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    assert ALONE.size == 1
    if operation:
        kill_before(operation, folder)
    if call:
        kill_in_call(call)
    ranks.command(*arguments)


class Stage:
    """A folder with a model, data, each trainer's settings, and its run without a kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for trainer, (make, _) in TRAINERS.items():
            config = make(folder, "unnamed", **STEPS, **SAVES)
            (folder / f"{trainer}.yaml").write_text(as_yaml(config_to_dict(config)))

    def run(
        self, trainer: str, run: str, *flags: str, operation: int = 0, call: int = 0
    ) -> tuple[int | None, str]:
        """Return the exit code of a run and what it printed."""
        arguments = [trainer, "--config", str(self.folder / f"{trainer}.yaml")]
        arguments += ["--run.dir", str(self.folder / run), *flags]
        logs = self.folder / "logs" / run
        logs.mkdir(parents=True, exist_ok=True)
        started = ranks.start(1, logs, run_alone, arguments, self.folder / run, operation, call)
        (code,) = started.join()
        return code, started.output(0)

    def straight(self, trainer: str) -> Path:
        """The run without a kill, made once."""
        folder = self.folder / f"straight-{trainer}"
        if not folder.exists():
            code, said = self.run(trainer, folder.name)
            assert code == 0, said
        return folder


def outcome(seed: int, stage: Stage) -> str:
    """Kill a run, go on with it to its end; return when it was killed.

    Raises:
        AssertionError: if it did not go on, or not to the same end.
    """
    chance = random.Random(seed)
    trainer = list(TRAINERS)[seed % len(TRAINERS)]
    straight, run = stage.straight(trainer), f"{trainer}-{seed}"
    folder, found, kills = stage.folder / run, "lived to its end", chance.choice([1, 1, 2])
    for _ in range(kills):
        at_file = chance.random() < 0.6
        operation = chance.randint(1, MOST_OPERATIONS) if at_file else 0
        call = 0 if at_file else chance.randint(1, MOST_CALLS)
        flags = ["--run.resume"] if folder.exists() and can_resume(folder) else []
        code, said = stage.run(trainer, run, *flags, operation=operation, call=call)
        assert "Traceback" not in said, said
        assert code in (0, KILLED), f"exit code {code}: {said}"
        if code == KILLED:
            found = "killed before a file operation" if at_file else "killed in a call"
            found += ", after a checkpoint" if can_resume(folder) else ", before any checkpoint"
    flags = ["--run.resume"] if can_resume(folder) else []
    code, said = stage.run(trainer, run, *flags)
    assert code == 0, f"does not go on: {said[-600:]}"
    assert_same_end(straight, folder)
    left = [path.name for path in folder.rglob(".*") if path.name != ".lock"]
    assert left == [], f"left behind: {left}"
    shutil.rmtree(folder)
    return found


def can_resume(folder: Path) -> bool:
    """Whether a checkpoint has its name."""
    return any((folder / CHECKPOINTS).glob("step-*"))
