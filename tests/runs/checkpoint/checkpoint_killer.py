"""Kills a process at every file operation of a save, and looks at what it leaves behind.

`main` prints a line of JSON for each kind of save, with the operations at which it was killed and
the faults found. It needs a process without threads, because it forks.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from fastalign.runs.checkpoint.restore import fault_of, newest_good_checkpoint, restore
from fastalign.runs.checkpoint.writer import CheckpointWriter, list_checkpoints
from tests.runs.checkpoint.checkpoint_cases import make_state, take_steps, trained

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "fsync"}
# What a save does: over nothing of its step, or over a checkpoint of that step; keeping 1 or 2.
KINDS = [(5, 2, True), (5, 1, False), (4, 1, False), (4, 2, True)]


def kill_before(number: int, folder: Path) -> None:
    """This process dies before the operation of that number, from 0, that changes the disk."""
    count = 0

    def count_one(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in EVENTS or (event == "open" and not opens_for_writing(arguments, folder)):
            return
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    plain = os.fsync
    os.fsync = lambda descriptor: (count_one("fsync", ()), plain(descriptor))[1]  # type: ignore[assignment]
    sys.addaudithook(count_one)


def opens_for_writing(arguments: tuple[Any, ...], folder: Path) -> bool:
    path, _, flags = arguments
    return str(path).startswith(str(folder)) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def weights(checkpoint: Path) -> torch.Tensor:
    state = make_state(seed=9)
    restore(checkpoint, state)
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def save(folder: Path, step: int, keep: int, background: bool, seed: int) -> None:
    state = trained(seed=seed, count=step - 1)
    writer = CheckpointWriter(folder, keep, background=background)
    writer.save(state, {})
    take_steps(state, 1)
    writer.finish()


def what_is_wrong(folder: Path, allowed: list[torch.Tensor], step: int, keep: int) -> str | None:
    """Of what a kill left: no good checkpoint, or strange weights, or no way to go on."""
    try:
        checkpoint, _ = newest_good_checkpoint(folder)
    except ValueError as error:
        return str(error)
    if not any(torch.equal(weights(checkpoint), value) for value in allowed):
        return f"{checkpoint} holds other weights"
    save(folder, step, keep, False, 2)
    names = [path.name for path in list_checkpoints(folder)]
    if len(names) > keep or names[0] != f"step-{step:06d}":
        return f"the next save left {names}"
    if sorted(names) != sorted(path.name for path in folder.iterdir()):
        return f"left behind: {sorted(path.name for path in folder.iterdir())}"
    return next((fault for path in list_checkpoints(folder) if (fault := fault_of(path))), None)


def main(root: Path) -> None:
    base = root / "base"
    for step in (2, 4):
        save(base, step, 2, False, 0)
    shutil.copytree(base / "step-000002", base / ".writing-step-000003")
    shutil.copytree(base / "step-000002", base / ".removing-step-000001")
    for step, keep, background in KINDS:
        allowed, faults, number, code = [weights(base / "step-000004")], [], 0, -1
        whole = root / "whole"
        shutil.copytree(base, whole)
        save(whole, step, keep, False, 1)
        allowed.append(weights(whole / f"step-{step:06d}"))
        shutil.rmtree(whole)
        while code != 0:
            folder = root / "killed"
            shutil.copytree(base, folder)
            child = os.fork()
            if child == 0:
                kill_before(number, folder)
                save(folder, step, keep, background, 1)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code in (0, -signal.SIGKILL), code
            if fault := what_is_wrong(folder, allowed, step, keep):
                faults.append(f"operation {number}: {fault}")
            shutil.rmtree(folder)
            number += code != 0
        print(json.dumps({"operations": number, "faults": faults}), flush=True)
