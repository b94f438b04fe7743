"""Errors of the user's own code: the last whole step is saved, and the source is named."""

from dataclasses import dataclass
from typing import Any

import pytest

from fastalign.ranks.errors import RANK_FAILED
from fastalign.runs.checkpoint.writer import CHECKPOINTS
from tests.faults.injected import NOW, Happens
from tests.faults.real import Stage, assert_nothing_left_behind, assert_same_bits
from tests.faults.shortages import NoConsole
from tests.faults.table import ALONE, DDP, FSDP, Place, fault

NEVER = ("--train.save-every", "0")
FAILS: set[int] = set()  # steps in which the reward function raises an error


def lengths(prompts: list[Any], completions: list[str]) -> list[float]:
    """A reward that asks a service."""
    if NOW.step in FAILS:
        raise ConnectionError("reward server at 10.0.0.9 did not answer")
    return [float(len(text)) for text in completions]


@dataclass(frozen=True)
class Unreachable:
    """The service of the reward, in one step."""

    step: int
    rank: int | None = None

    def install(self) -> None:
        FAILS.add(self.step)


def bug() -> None:
    raise KeyError("of the loop's own")


@fault(
    "an error in a reward function",
    *(ALONE, DDP),
    does="the function's own traceback, and `reward.sources: tests.faults.test_user_code:lengths: "
    "reward: the code raised ConnectionError('reward server at 10.0.0.9 did not answer'); step 2 "
    "is saved, go on with --run.resume`; exit code 1 of every rank; resumed, it ends with the bits "
    "of a run without it",
)
def test_reward_function(stage: Stage, run: str, place: Place) -> None:
    flags = ("--reward.sources", "tests.faults.test_user_code:lengths", *NEVER)
    straight = stage.finish(place, f"{run}-straight", *flags, trainer="ppo")
    options: dict[str, Any] = {"trainer": "ppo", "faults": [Unreachable(3)], "traces": True}
    failed = stage.run(place, run, *flags, **options)
    assert failed.codes == [1] * place.num_ranks
    assert "in lengths" in failed.outputs[0]
    assert "apply_reward" not in failed.outputs[0]
    assert_nothing_left_behind(failed)
    assert_same_bits(stage.finish(place, run, *flags, "--run.resume", trainer="ppo"), straight)


@fault(
    "an error in a loop of somebody's own, behind a step, on one rank",
    *(ALONE, DDP, FSDP),
    does="a traceback with `step 3 is saved, go on with --run.resume`, exit code 1; the other "
    "ranks have that step too, save it with this one and end with exit code 4; resumed, it ends "
    "with the bits of a run without it",
)
def test_own_loop(stage: Stage, run: str, place: Place) -> None:
    last = place.num_ranks - 1
    faults = [Happens(bug, "behind", step=3, rank=last)]
    failed = stage.run(place, run, *NEVER, faults=faults, traces=True)
    assert failed.codes == [RANK_FAILED] * last + [1], "\n".join(failed.outputs)
    assert [path.name for path in (failed.folder / CHECKPOINTS).iterdir()] == ["step-000003"]
    assert_same_bits(stage.finish(place, run, "--run.resume"), stage.straight(place))


@fault(
    "a console that cannot be written: a pipe whose reader is gone (`| head`), a full disk",
    *(ALONE, DDP),
    does="what is said there is lost, and nothing else: exit code 0, the bits of a run without it",
)
@pytest.mark.parametrize("what", ["a closed pipe", "a full disk"])
def test_no_console(stage: Stage, run: str, place: Place, what: Any) -> None:
    end = stage.finish(place, run, faults=[Happens(NoConsole(what), step=3, rank=None)])
    assert "dpo 3/8" not in end.outputs[0]
    assert_same_bits(end, stage.straight(place))
