"""`fastalign preflight`: checks that a run on several processes can start, before it is started.

Every rank makes every check and sees every rank's findings, so that all leave with one verdict.
"""

import os
import platform
import secrets
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.config_parse import take_option
from fastalign.cli.report import show
from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.failure import GO_ON, ignore_sigterm, watched_by_ranks
from fastalign.ranks.world import (
    RankFailed,
    RanksDiffer,
    World,
    differing,
    first_line,
    here,
    named,
    open_world,
    world_of_environment,
)
from fastalign.runs.config import AnyConfig, config_to_dict
from fastalign.runs.folder import flat_settings
from fastalign.runs.open import device_of_rank

SECONDS = 50.0  # with the imports before, a minute
MOST_LAG_SECONDS = 5.0  # until other machines see a file on a shared disk
USAGE = f"""usage: fastalign preflight [--timeout-seconds S] [--world-size N] COMMAND FLAGS

Start it as the run will be started (torchrun ... -m fastalign preflight dpo --config F), with the
run's command ({" | ".join(ALGORITHMS)}) and flags. Checks that all ranks come, with one
configuration and the same versions, each with a device of its own; that run.dir is one folder for
all, and can be written; and that a sum over the ranks is right. It trains nothing, and leaves
nothing behind.

--timeout-seconds S: the check ends after this time, whatever hangs (default {SECONDS:g})
--world-size N: the number of ranks that is expected (default: WORLD_SIZE)

Exit code 0: the run can start; 2, on every rank: it cannot, and a line says why."""
PACKAGES = ("torch", "fastalign", "transformers")
COLUMNS = ("rank", "host", "device", *PACKAGES, "free in run.dir")

Facts = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Return exit code 0 if the run can start, 2 if not."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    text, arguments = take_option(argv, "--timeout-seconds")
    size, arguments = take_option(arguments, "--world-size")
    seconds = seconds_of(text)
    if not arguments or arguments[0] not in ALGORITHMS:
        got = repr(arguments[0]) if arguments else "none"
        raise ValueError(f"expected a command ({', '.join(ALGORITHMS)}) and its flags, got {got}")
    world = world_of_environment()
    if size is not None and size != str(world.size):
        raise ValueError(f"--world-size: expected {size} ranks, got {world.size} (WORLD_SIZE)")
    config = ALGORITHMS[arguments[0]].parse(arguments[1:])
    try:
        with ended_after(seconds, world):
            rows = preflight(config, world, seconds / 2)
    except (RanksDiffer, RankFailed) as error:
        ignore_sigterm()  # torchrun ends all ranks once the first leaves, and this one has to print
        if world.local_rank == 0:
            text = str(error).replace(f"; {GO_ON}", "")
            print(f"fastalign preflight: {text}", file=sys.stderr, flush=True)
        return 2
    if world.is_first:
        show(COLUMNS, rows, num_left=3)
        print(f"preflight: {world.size} of {world.size} ranks are ready", flush=True)
    return 0


def seconds_of(text: str | None) -> float:
    """Return the time limit that an argument sets.

    Raises:
        ValueError: if it is no positive number.
    """
    try:
        seconds = SECONDS if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--timeout-seconds: expected a positive number, got {text}")
    return seconds


@contextmanager
def ended_after(seconds: float, world: World) -> Iterator[None]:
    """End this process with a line after `seconds`, in native code that no exception reaches too.

    A disk that hangs and a port where something else than a store listens can be waited for without
    an end.
    """

    def end() -> None:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        print(
            f"fastalign preflight: {here(world)}: no end in {seconds:g} seconds; is rank 0 at "
            f"{address} (MASTER_ADDR, MASTER_PORT), and does the disk of run.dir answer?",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def preflight(config: AnyConfig, world: World, seconds: float) -> list[tuple[str, ...]]:
    """Make all checks; return one row for each rank, with the cells that COLUMNS name.

    Args:
        config: settings of the run.
        world: place of this process.
        seconds: time limit of the ranks' arrival, and of each collective.

    Raises:
        RanksDiffer: if something is at fault, on every rank.
        RankFailed: if a rank is missing.
        ValueError: if this rank does not reach rank 0.
    """
    parallel = ParallelConfig(silence_seconds=seconds / 4)
    with open_world(world, timeout_seconds=seconds), watched_by_ranks(world, parallel):
        device, mine = facts_of(config, world)
        facts = agree(world, mine, faults_of)
        folder = Path(config.run.dir).expanduser()
        disks = agree(world, folder_facts(folder, world), faults_of_folder)
        agree(world, {"host": mine["host"], "fault": fault_of_sums(world, device)}, own_faults)
    return [
        (
            str(rank),
            row["host"],
            row["device"],
            *(row["versions"][name] for name in PACKAGES),
            f"{disk['free'] / 2**30:.1f} GiB",
        )
        for rank, (row, disk) in enumerate(zip(facts, disks, strict=True))
    ]


def agree(world: World, mine: Facts, judge: Callable[[list[Facts]], list[str]]) -> list[Facts]:
    """Gather every rank's findings; raise unless `judge` finds no fault in them.

    Raises:
        RanksDiffer: if it does, on every rank.
    """
    facts = world.gather(mine)
    faults = judge(facts)
    if faults:
        raise RanksDiffer("; ".join(faults))
    return facts


def facts_of(config: AnyConfig, world: World) -> tuple[torch.device, Facts]:
    """Return the device of this rank, and the facts that ranks compare."""
    fault, gpu = "", None
    try:
        device = device_of_rank(config.train.device, world)
    except ValueError as error:
        device, fault = torch.device("cpu"), str(error)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        gpu = str(torch.cuda.get_device_properties(device).uuid)
    settings = flat_settings(config_to_dict(config))
    settings.pop("run.dir")  # machines may mount one disk in different places
    return device, {
        "host": platform.node(),
        "device": str(device),
        "gpu": gpu,
        "fault": fault,
        "versions": {name: version(name) for name in PACKAGES},
        "settings": settings,
    }


def own_faults(facts: Sequence[Facts]) -> list[str]:
    """Return each rank's own fault with the rank's name."""
    return [
        f"{named([rank], {rank: found['host']})}: {found['fault']}"
        for rank, found in enumerate(facts)
        if found["fault"]
    ]


def faults_of(facts: Sequence[Facts]) -> list[str]:
    """Return one message per inconsistency between ranks (versions, settings, shared GPU)."""
    hosts = {rank: str(found["host"]) for rank, found in enumerate(facts)}
    faults = own_faults(facts)
    for package in PACKAGES:
        faults += differing(package, [found["versions"][package] for found in facts], hosts)
    if not faults:
        kinds = [str(found["device"]).partition(":")[0] for found in facts]
        faults += differing("train.device", kinds, hosts)
    for name in sorted(set().union(*(found["settings"] for found in facts))):
        values = [repr(found["settings"].get(name)) for found in facts]
        faults += differing(name, values, hosts)
    places = [(found["host"], found["gpu"]) for found in facts]
    for place, number in Counter(places).items():
        if number > 1 and place[1] is not None:
            ranks = [rank for rank, other in enumerate(places) if other == place]
            faults.append(f"{named(ranks, hosts)} have one GPU ({facts[ranks[0]]['device']})")
    return faults


def folder_facts(folder: Path, world: World) -> Facts:
    """Write a file on rank 0, look for it on the others; remove all that was made.

    Returns:
        The machine, the folder, its free bytes, whether rank 0's file is there, and an error or "".
    """
    word, made = world.of_first(secrets.token_hex(8)), []
    shared, own = (folder / f".preflight-{word}{end}" for end in ("", f"-{world.rank}"))
    fault, sees, free = "", True, 0
    try:
        if world.is_first:
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            made = missing
            shared.touch()
    except OSError as error:
        fault = f"cannot be written ({error.strerror})"
    fault = world.of_first(fault)
    if not fault:
        sees = appears(shared)
    if not fault and sees:
        try:
            own.touch()
            own.unlink()
            free = shutil.disk_usage(folder).free
        except OSError as error:
            fault = f"cannot be written ({error.strerror})"
    world.barrier()  # all have looked
    if world.is_first:
        with suppress(OSError):
            shared.unlink()
    for path in made:
        with suppress(OSError):  # a run has begun in it
            path.rmdir()
    where = {"host": platform.node(), "folder": str(folder.absolute())}
    return {**where, "free": free, "sees": sees, "fault": fault}


def appears(path: Path) -> bool:
    """Wait until a file that another machine wrote is seen here; return False if it is not."""
    end = time.monotonic() + MOST_LAG_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def faults_of_folder(rows: Sequence[Facts]) -> list[str]:
    """Return one message for the ranks that do not see rank 0's file, one for each other fault."""
    hosts = {rank: str(row["host"]) for rank, row in enumerate(rows)}
    blind = [rank for rank, row in enumerate(rows) if not row["sees"]]
    faults = []
    if blind:
        faults.append(
            f"run.dir: {rows[blind[0]]['folder']} is not shared: on {named(blind, hosts)} it does "
            f"not hold the file that rank 0 on {hosts[0]} wrote"
        )
    for fault in dict.fromkeys(row["fault"] for row in rows if row["fault"]):
        ranks = [rank for rank, row in enumerate(rows) if row["fault"] == fault]
        faults.append(f"run.dir: {rows[ranks[0]]['folder']} {fault} on {named(ranks, hosts)}")
    return faults


def fault_of_sums(world: World, device: torch.device) -> str:
    """Sum over all ranks, by gloo and on GPUs by NCCL; return what is wrong with it, or ""."""
    if world.size == 1:
        return ""
    for place in dict.fromkeys((torch.device("cpu"), device)):
        number = torch.tensor(float(world.rank + 1), device=place)
        try:
            dist.all_reduce(number)
            total = number.item()
        except (RuntimeError, ValueError) as error:
            if place.type == "cpu":
                raise  # a rank is missing
            return f"a sum on {place}: {first_line(error)} (NCCL_SOCKET_IFNAME)"
        expected = world.size * (world.size + 1) / 2
        if total != expected:
            return f"a sum on {place}: expected {expected:g}, got {total:g}"
    return ""
