"""`fastalign preflight`: whether a run on several processes can start, before it is started."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.config_parse import take_option
from fastalign.cli.report import show
from fastalign.preflight.checks import COLUMNS, preflight, table
from fastalign.preflight.meeting import Deadline, Disagreement, Meeting, is_stuck
from fastalign.ranks.world import World, world_of_environment

SECONDS = 50.0  # with the imports before and the farewell behind it, a minute
USAGE = f"""usage: fastalign preflight [--timeout-seconds S] [--world-size N] COMMAND FLAGS

Started as the run will be (torchrun ... -m fastalign preflight dpo --config F), with its command
({" | ".join(ALGORITHMS)}) and its flags. Checks that all ranks come, with one configuration and the
same versions, each with a device of its own; that run.dir is one folder for all, and can be
written; and that a sum over the ranks is right. Trains nothing, and leaves nothing behind.

--timeout-seconds S: all is over then, whatever hangs (default {SECONDS:g})
--world-size N: how many ranks are expected (default: as many as WORLD_SIZE says)

Exit code 0: the run can start; 2, on every rank: it cannot, and the line says why."""


def seconds_of(text: str | None) -> float:
    """The time for all checks.

    Raises:
        ValueError: no positive number.
    """
    try:
        seconds = SECONDS if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--timeout-seconds: expected a positive number, got {text}")
    return seconds


def check_size(text: str | None, world: World) -> None:
    """Compares with the number of ranks that was asked for.

    Raises:
        ValueError: it is another one.
    """
    if text is not None and text != str(world.size):
        raise ValueError(f"--world-size: expected {text} ranks, got {world.size} (WORLD_SIZE)")


def main(argv: Sequence[str]) -> int:
    """Exit code 0 if the run can start, 2 if not."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    seconds, arguments = take_option(argv, "--timeout-seconds")
    size, arguments = take_option(arguments, "--world-size")
    deadline = Deadline(seconds_of(seconds))
    if not arguments or arguments[0] not in ALGORITHMS:
        got = repr(arguments[0]) if arguments else "none"
        raise ValueError(f"expected a command ({', '.join(ALGORITHMS)}) and its flags, got {got}")
    world = world_of_environment()
    check_size(size, world)
    config = ALGORITHMS[arguments[0]].parse(arguments[1:])
    code = checked(config, world, deadline)
    if is_stuck():
        sys.stdout.flush()
        os._exit(code)
    return code


def checked(config: Any, world: World, deadline: Deadline) -> int:
    """Makes the checks; rank 0 shows them, one process of each machine says what failed."""
    meeting = Meeting(world, deadline)
    try:
        rows = preflight(config, world, meeting, deadline)
        if world.is_first:
            show(COLUMNS, table(rows), num_left=3)
            print(f"preflight: {world.size} of {world.size} ranks are ready", flush=True)
        return 0
    except Disagreement as fault:
        if world.local_rank == 0:
            print(f"fastalign preflight: {fault}", file=sys.stderr, flush=True)
        return 2
    finally:
        meeting.close()
