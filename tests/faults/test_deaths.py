"""Processes that are killed, or stand still: the others say which, and the run goes on from disk."""

import signal

from fastalign.trainers.checkpoint_files import CHECKPOINTS
from fastalign.world import RANK_FAILED
from tests.faults.injected import Happens, KilledInSave, Sent
from tests.faults.real import Outcome, Stage, assert_nothing_left_behind, assert_same_bits
from tests.faults.table import ALONE, Place, fault

KILLED = -signal.SIGKILL
SILENCE = ("--parallel.silence-seconds", "5")


@fault(
    "SIGKILL in a step",
    *(ALONE,),
    does="the step is lost, and nothing else: resumed, it ends with the bits of a run without it",
)
def test_killed_in_a_step(stage: Stage, run: str, place: Place) -> None:
    killed = stage.run(place, run, faults=[Happens(Sent(signal.SIGKILL), step=4, batch="last")])
    assert killed.codes == [KILLED]
    assert_same_bits(stage.finish(place, run, "--run.resume"), stage.straight(place))


def killed_again_and_again(
    stage: Stage, place: Place, run: str, rank: int, operations: range
) -> int:
    """A run that dies in each save one operation later; how often."""
    folder = stage.folder / run / CHECKPOINTS
    codes: list[int | None] = []
    for number, operation in enumerate(operations):
        flags = ["--run.resume"] if number else ["--train.stop-at-step", "1"]
        fault = [KilledInSave(operation, folder, rank)] if number else []
        outcome = stage.run(place, run, *flags, faults=fault)
        codes = outcome.codes
        if codes[rank] != KILLED and number:
            return number
        assert number == 0 or outcome.codes == ends(place, rank, KILLED), outcome.outputs
    return len(operations)


def ends(place: Place, rank: int, code: int) -> list[int]:
    return [code if other == rank else RANK_FAILED for other in range(place.num_ranks)]


@fault(
    "SIGKILL before any of the file operations of a save",
    *(ALONE,),
    does="`resumed from` the newest whole checkpoint each time; nothing half-written is left, and "
    "the run ends with the bits of one without a stop",
    trl="a half-written newer checkpoint: an error, no fall-back to the older one",
)
def test_killed_in_a_save(stage: Stage, run: str, place: Place) -> None:
    assert killed_again_and_again(stage, place, run, 0, range(-1, 99)) > 15
    end = Outcome([], [], stage.folder / run)
    assert_nothing_left_behind(end)
    assert_same_bits(end, stage.straight(place))
