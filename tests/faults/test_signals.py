"""Signals: all ranks stop behind one step, saved, and go on to the same bits."""

import signal

import pytest

from tests.faults.injected import Happens, Sent
from tests.faults.real import Stage, assert_nothing_left_behind, assert_same_bits
from tests.faults.table import ALONE, DDP, FSDP, Place, fault

SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)


def stop_and_go_on(stage: Stage, place: Place, run: str, code: int, *happens: Happens) -> None:
    stopped = stage.run(place, run, faults=happens)
    assert stopped.codes == [code] * place.num_ranks
    assert not (stopped.folder / "model").exists()
    assert_nothing_left_behind(stopped)
    assert_same_bits(stage.finish(place, run, "--run.resume"), stage.straight(place))


@fault(
    "SIGTERM or SIGINT in a step, to every process",
    *(ALONE, DDP),
    does="`stopping after this step and saving; again: stop now`, `stopped at step 3; saved; go on "
    "with --run.resume`, exit code 0 (SIGTERM) or 130 (SIGINT); resumed, it ends with the bits of "
    "a run without a stop",
    trl="SIGTERM: exit code 143, nothing saved",
)
@SIGNALS
def test_to_all(stage: Stage, run: str, place: Place, number: signal.Signals, code: int) -> None:
    stop_and_go_on(stage, place, run, code, Happens(Sent(number), step=3, rank=None))


@fault(
    "SIGUSR1, SIGXCPU or SIGHUP in a step",
    *(ALONE,),
    does="the same: exit code 0 after SIGUSR1 and SIGXCPU, which schedulers send, and 129 after "
    "SIGHUP, as of a closed terminal",
)
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGUSR1, 0), (signal.SIGXCPU, 0), (signal.SIGHUP, 129)],
    ids=["SIGUSR1", "SIGXCPU", "SIGHUP"],
)
def test_others(stage: Stage, run: str, place: Place, number: signal.Signals, code: int) -> None:
    stop_and_go_on(stage, place, run, code, Happens(Sent(number), step=3))


@fault(
    "SIGTERM and SIGHUP to every process at once, three times",
    *(DDP,),
    does="within two seconds they are one request, as of torchrun, which forwards what its workers "
    "got already: `stopped at step 3; saved; go on with --run.resume`",
)
def test_more_than_once(stage: Stage, run: str, place: Place) -> None:
    numbers = (signal.SIGTERM, signal.SIGHUP)
    happens = [Happens(Sent(number), step=3, rank=None) for number in numbers * 3]
    stop_and_go_on(stage, place, run, 0, *reversed(happens))


@fault(
    "SIGTERM or SIGINT to one rank of several",
    *(DDP, FSDP),
    does="all ranks stop behind the same step: `stopped at step 3; saved; go on with --run.resume`,"
    " the same exit codes; resumed, it ends with the bits of a run without a stop",
)
@SIGNALS
def test_to_one(stage: Stage, run: str, place: Place, number: signal.Signals, code: int) -> None:
    last = place.num_ranks - 1
    happens = Happens(Sent(number), step=3, batch="last", rank=last)
    stop_and_go_on(stage, place, run, code, happens)


@fault(
    "SIGTERM while a checkpoint is written",
    *(ALONE, DDP),
    does="that checkpoint is finished, and so is the step: `saved; go on with --run.resume`, exit "
    "code 0; resumed, it ends with the bits of a run without a stop",
)
def test_in_a_save(stage: Stage, run: str, place: Place) -> None:
    stop_and_go_on(stage, place, run, 0, Happens(Sent(signal.SIGTERM), "save", step=3))
