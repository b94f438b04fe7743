"""Processes that are killed or stand still: others say which, and the run goes on from disk."""

import signal
from collections.abc import Iterable

from fastalign.ranks.errors import RANK_FAILED
from fastalign.runs.checkpoint.writer import CHECKPOINTS
from tests import rank_processes as ranks
from tests.faults.injected import Happens, KilledInSave, Sent
from tests.faults.real import HEARD, Outcome, Stage, assert_nothing_left_behind, assert_same_bits
from tests.faults.table import ALONE, DDP, FSDP, FSDP3, Place, fault

KILLED = -signal.SIGKILL
SILENCE = ("--parallel.timeout-seconds", "6", "--parallel.silence-seconds", "1")


@fault(
    "SIGKILL in a step",
    *(ALONE,),
    does="the step is lost, and nothing else: resumed, it ends with the bits of a run without it",
)
def test_killed_in_a_step(stage: Stage, run: str, place: Place) -> None:
    killed = stage.run(place, run, faults=[Happens(Sent(signal.SIGKILL), step=4, batch="last")])
    assert killed.codes == [KILLED]
    assert_same_bits(stage.finish(place, run, "--run.resume"), stage.straight(place))


@fault(
    "SIGKILL before the first checkpoint",
    *(ALONE,),
    does="`the run in ... ended before its first checkpoint: it begins again at the first step; "
    "its metrics are moved to metrics.jsonl.1`, with --run.resume and without; nothing has to be "
    "deleted; it ends with the bits of a run without it",
)
def test_killed_before_the_first_checkpoint(stage: Stage, run: str, place: Place) -> None:
    for number, flags in enumerate(((), ("--run.resume",))):
        name = f"{run}-{number}"
        death = Happens(Sent(signal.SIGKILL), step=4)
        killed = stage.run(place, name, "--train.save-every", "0", faults=[death])
        assert killed.codes == [KILLED]
        end = stage.finish(place, name, *flags)
        assert len((end.folder / "metrics.jsonl.1").read_text().splitlines()) == 3
        assert_same_bits(end, stage.straight(place))


def ends(place: Place, rank: int, code: int) -> list[int]:
    """Exit codes where one rank ends by itself, and the others because it does."""
    return [code if other == rank else RANK_FAILED for other in range(place.num_ranks)]


def killed_in_saves(stage: Stage, place: Place, run: str, deaths: Iterable[tuple[int, int]]) -> int:
    """Resumes a run of one step with (rank, operation) dying in its first save; how often."""
    stage.run(place, run, "--train.stop-at-step", "1")
    folder = stage.folder / run / CHECKPOINTS
    for count, (rank, operation) in enumerate(deaths):
        faults = [KilledInSave(operation, folder, rank)]
        outcome = stage.run(place, run, "--run.resume", faults=faults)
        if outcome.codes[rank] != KILLED:
            return count
        assert outcome.codes == ends(place, rank, KILLED), outcome.outputs
    return count + 1


@fault(
    "SIGKILL before any of the file operations of a save",
    *(ALONE,),
    does="`resumed from` the newest whole checkpoint each time; nothing half-written is left, and "
    "the run ends with the bits of one without a stop",
    trl="a half-written newer checkpoint: an error, no fall-back to the older one",
)
def test_killed_in_a_save(stage: Stage, run: str, place: Place) -> None:
    assert killed_in_saves(stage, place, run, ((0, n) for n in range(99))) > 15
    end = Outcome([], [], stage.folder / run)
    assert_nothing_left_behind(end)
    assert_same_bits(end, stage.straight(place))


@fault(
    "SIGKILL to one rank in a save",
    *(DDP, FSDP),
    does="`is gone; the run goes on from its newest checkpoint with --run.resume`, exit code 4 of "
    "the others; resumed, it ends with the bits of a run without it",
)
def test_a_rank_killed_in_a_save(stage: Stage, run: str, place: Place) -> None:
    deaths = [(0, 3), (1, 1)] if place == DDP else [(0, 9), (1, 0)]
    assert killed_in_saves(stage, place, run, deaths) == len(deaths)
    end = stage.finish(place, run, "--run.resume")
    assert_nothing_left_behind(end)
    assert_same_bits(end, stage.straight(place))


def one_ends(
    stage: Stage, place: Place, run: str, happens: Happens, trainer: str = "dpo", **how: bool
) -> Outcome:
    """A run of which one rank is killed or stopped; it goes on to the bits of one without that."""
    rank = happens.rank
    assert rank is not None
    stops = happens.what == STOPPED
    flags = SILENCE if stops else ()
    started = stage.start(place, run, *flags, faults=[happens], trainer=trainer, **how)
    outcome = stage.end(run, started, stopped=rank if stops else None)
    assert outcome.codes == ends(place, rank, KILLED), "\n".join(outcome.outputs)
    for other in set(range(place.num_ranks)) - {rank}:
        assert f"rank {rank} of {place.num_ranks} (" in outcome.outputs[other], outcome.outputs
    flags = () if happens.where == "setup" else ("--run.resume",)
    end = stage.finish(place, run, *flags, trainer=trainer)
    assert_nothing_left_behind(end)
    assert_same_bits(end, stage.straight(place, trainer))
    return outcome


GONE = (
    "the others: `is gone; the run goes on from its newest checkpoint with --run.resume`, naming "
    "the rank, its machine and its process, exit code 4; the run goes on to the bits of one without"
)
DEAD, STOPPED = Sent(signal.SIGKILL), Sent(signal.SIGSTOP)


@fault("SIGKILL to one rank in a step", DDP, FSDP3, does=GONE)
def test_a_rank_killed_in_a_step(stage: Stage, run: str, place: Place) -> None:
    one_ends(stage, place, run, Happens(DEAD, step=4, batch="last", rank=place.num_ranks - 1))


@fault("SIGKILL to one rank in setup", DDP, does=GONE)
def test_a_rank_killed_in_setup(stage: Stage, run: str, place: Place) -> None:
    one_ends(stage, place, run, Happens(DEAD, "setup", rank=1))


@fault("SIGKILL to one rank in a PPO rollout", DDP, does=GONE)
def test_a_rank_killed_in_a_rollout(stage: Stage, run: str, place: Place) -> None:
    one_ends(stage, place, run, Happens(DEAD, "rollout", step=3, rank=1), trainer="ppo")


SILENT = (
    "the others, once a collective has timed out (--parallel.timeout-seconds): `has not answered "
    "for 1 seconds (--parallel.silence-seconds); the run goes on from its newest checkpoint with "
    "--run.resume`, naming the rank, exit code 4; the same"
)


@fault("SIGSTOP to one rank in a step", DDP, FSDP, does=SILENT)
def test_a_rank_stopped_in_a_step(stage: Stage, run: str, place: Place) -> None:
    one_ends(stage, place, run, Happens(STOPPED, step=4, rank=1))


@fault("SIGSTOP to one rank in a save", DDP, does=SILENT)
def test_a_rank_stopped_in_a_save(stage: Stage, run: str, place: Place) -> None:
    one_ends(stage, place, run, Happens(STOPPED, "save", step=4, rank=1))


@fault("SIGSTOP to one rank in setup", DDP, does=SILENT)
def test_a_rank_stopped_in_setup(stage: Stage, run: str, place: Place) -> None:
    one_ends(stage, place, run, Happens(STOPPED, "setup", rank=1))


@fault("SIGSTOP to one rank in a PPO rollout", DDP, does=SILENT)
def test_a_rank_stopped_in_a_rollout(stage: Stage, run: str, place: Place) -> None:
    one_ends(stage, place, run, Happens(STOPPED, "rollout", step=3, rank=1), trainer="ppo")


@fault("SIGSTOP to rank 0, which holds the store where the ranks met", DDP, does=SILENT)
def test_the_first_rank_stopped(stage: Stage, run: str, place: Place) -> None:
    one_ends(stage, place, run, Happens(STOPPED, step=4, rank=0), first_holds_store=True)


@fault(
    "SIGKILL to one rank under torchrun",
    *(DDP,),
    does="before torchrun ends the others, one has said `rank 0: rank 1 of 2 (...) is gone; the "
    "run goes on from its newest checkpoint with --run.resume`; the same",
)
def test_under_torchrun(stage: Stage, run: str, place: Place) -> None:
    started = ranks.torchrun(
        *(2, stage.folder / f"logs of {run}", "tests.faults.torchrun", "1", "4"),
        *stage.command(place, run),
    )
    assert started.join() == [1]
    HEARD.append(started.output(0))
    assert_same_bits(stage.finish(place, run, "--run.resume"), stage.straight(place))
