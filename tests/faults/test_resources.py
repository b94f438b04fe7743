"""What a machine may lack: room on its disk, memory, time."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastalign.runs.checkpoint.writer import CHECKPOINTS
from tests.faults.injected import Happens, UntilWritten
from tests.faults.real import Stage, assert_nothing_left_behind, assert_same_bits
from tests.faults.shortages import Filled, SmallFiles, disk_error, out_of_memory
from tests.faults.table import ALONE, DDP, FSDP, Place, fault


@pytest.fixture
def disk(stage: Stage, run: str) -> Iterator[Path]:
    """The run's folder as a disk of its own, on which three checkpoints have room."""
    folder = stage.folder / run
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1700k", "tmpfs", str(folder)]
    if os.geteuid():
        pytest.skip("needs to mount a tmpfs")
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs to mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def more_room(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)


@fault(
    "a disk that is full while a checkpoint is written (a tmpfs of 1.7 MB)",
    *(ALONE, DDP),
    does="`was not written...: No space left on device; older checkpoints are untouched; training "
    "goes on, and it is tried again behind step`; the last one has to be written, else exit code "
    "2; nothing half-written is left; with more room it goes on to the bits of a run without it",
)
def test_full_disk(stage: Stage, run: str, place: Place, disk: Path) -> None:
    # Written before the next step: beside it, the next line of metrics.jsonl may be what fails.
    full = stage.run(place, run, "--train.no-async-checkpoints")
    assert full.codes == [2] * place.num_ranks, "\n".join(full.outputs)
    assert not list((disk / CHECKPOINTS).glob(".*"))
    assert (disk / CHECKPOINTS / "step-000002").exists()
    more_room(disk)
    end = stage.finish(place, run, "--run.resume")
    assert_nothing_left_behind(end)
    assert_same_bits(end, stage.straight(place))


@fault(
    "a disk that is full while metrics.jsonl is written",
    *(ALONE, DDP),
    does="`TensorBoard's files are not complete`, `metrics.jsonl: No space left on "
    "device; the lines are held, and tried again after each step`, and training goes on; if there "
    "is no room to the end, `step 3 is saved, go on with --run.resume`, exit code 2; with more "
    "room it goes on to the bits of a run without it",
)
def test_full_disk_for_metrics(stage: Stage, run: str, place: Place, disk: Path) -> None:
    more_room(disk)
    # In the last page of metrics.jsonl there is room for a line or two after that.
    flags = ("--train.save-every", "3", "--train.no-async-checkpoints")
    flags += ("--track.to", "tensorboard")
    full = stage.run(place, run, *flags, faults=[Happens(Filled(disk / "filler"), step=4)])
    assert full.codes == [2] * place.num_ranks, "\n".join(full.outputs)
    (disk / "filler").unlink()
    assert (disk / CHECKPOINTS / "step-000003").exists()
    end = stage.finish(place, run, "--run.resume")
    assert_nothing_left_behind(end)
    assert_same_bits(end, stage.straight(place))


@fault(
    "a disk that is full for one rank alone",
    *(DDP, FSDP),
    does="`was not written (rank 1): File too large; older checkpoints are untouched; training goes"
    " on`; since the last one fails too, exit code 2 of every rank; nothing half-written is left; "
    "resumed, it ends with the bits of a run without",
)
def test_full_disk_of_one_rank(stage: Stage, run: str, place: Place) -> None:
    full = stage.run(place, run, faults=[Happens(SmallFiles(4096), "save", step=3, rank=1)])
    assert full.codes == [2] * place.num_ranks, "\n".join(full.outputs)
    assert_nothing_left_behind(full)
    assert_same_bits(stage.finish(place, run, "--run.resume"), stage.straight(place))


@fault(
    "a checkpoint that fails once, of one rank (EIO)",
    *(ALONE, DDP),
    does="`was not written...: Input/output error; older checkpoints are untouched; training goes "
    "on, and it is tried again behind step 5`, where it is saved; exit code 0, the bits of a run "
    "without it",
)
def test_one_failed_save(stage: Stage, run: str, place: Place) -> None:
    flags = ("--train.save-every", "4", "--train.no-async-checkpoints")
    fails = Happens(disk_error, "save", step=4, rank=place.num_ranks - 1)
    end = stage.finish(place, run, *flags, faults=[fails])
    saved = sorted(path.name for path in (end.folder / CHECKPOINTS).iterdir())
    assert saved == ["step-000005", "step-000008"]
    assert_same_bits(end, stage.straight(place))


@fault(
    "out of memory in a step, before its first update",
    *(ALONE, FSDP),
    does="the step before it is saved: `out of memory in step 4, a batch of ... tokens; lower "
    "--train.tokens-per-batch`, `The run goes on from step-000003 with the changed setting, "
    "--run.resume`, exit code 2 (of other ranks 4: they name the one); resumed, it ends with the "
    "bits of a run without it",
)
def test_out_of_memory(stage: Stage, run: str, place: Place) -> None:
    last, flags = place.num_ranks - 1, ("--train.save-every", "0")
    outcome = stage.run(place, run, *flags, faults=[Happens(out_of_memory, step=4, rank=last)])
    assert outcome.codes == [4] * last + [2]
    said = f"rank {last} of {place.num_ranks} ("
    assert all(said in output and "out of memory" in output for output in outcome.outputs[:last])
    end = stage.finish(place, run, "--run.resume")
    assert_nothing_left_behind(end)
    assert_same_bits(end, stage.straight(place))


@fault(
    "one rank that hangs in a step for longer than --train.stall-seconds",
    *(ALONE, DDP, FSDP),
    does="`step 4 took more than 1 seconds; the stacks of all threads are in ...stalls.txt`: every "
    "rank's stacks are in a file of its own while it hangs; the run goes on, to the same bits",
)
def test_stall(stage: Stage, run: str, place: Place) -> None:
    names = ["stalls.txt", *(f"stalls-rank{rank:05d}.txt" for rank in range(1, place.num_ranks))]
    files = [stage.folder / run / name for name in names]
    hangs = Happens(UntilWritten(files, b"in dpo_gradient"), step=4, rank=place.num_ranks - 1)
    end = stage.finish(place, run, "--train.stall-seconds", "1", faults=[hangs])
    assert "in __call__" in files[-1].read_text()
    assert_same_bits(end, stage.straight(place))
