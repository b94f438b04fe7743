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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.config_parse import take_option
from fastalign.cli.report import show
from fastalign.cli.settings import PREFLIGHT_SECONDS
from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.errors import RankFailed, RanksDiffer
from fastalign.ranks.failure import GO_ON, ignore_sigterm, watched_by_ranks
from fastalign.ranks.world import (
    World,
    differing,
    first_line,
    here,
    named,
    open_world,
    world_of_environment,
)
from fastalign.runs.config import TrainingConfig, config_to_dict
from fastalign.runs.open import device_of_rank
from fastalign.yaml_file import flat_settings

MOST_LAG_SECONDS = 5.0  # until other machines see a file on a shared disk
PACKAGES = ("torch", "fastalign", "transformers")
COLUMNS = ("rank", "host", "device", *PACKAGES, "free in run.dir")

Facts = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Return exit code 0 if the run can start, 2 if not."""
    seconds, arguments = take_option(argv, "--timeout-seconds")
    size, arguments = take_option(arguments, "--world-size")
    limit = PREFLIGHT_SECONDS if seconds is None else seconds_of(seconds)
    if not arguments or arguments[0] not in ALGORITHMS:
        got = repr(arguments[0]) if arguments else "none"
        raise ValueError(f"expected a command ({', '.join(ALGORITHMS)}) and its flags, got {got}")
    world = world_of_environment()
    if size is not None and size != str(world.size):
        raise ValueError(f"--world-size: expected {size} ranks, got {world.size} (WORLD_SIZE)")
    config = ALGORITHMS[arguments[0]].parse(arguments[1:])
    try:
        with ended_after(limit, world):
            rows = preflight(config, world, limit / 2)
    except (RanksDiffer, RankFailed) as error:
        ignore_sigterm()  # torchrun ends all ranks once the first leaves, and this one has to print
        if world.local_rank == 0:
            text = str(error).replace(f"; {GO_ON}", "")
            print(f"fastalign preflight: {text}", file=sys.stderr)
        return 2
    if world.is_first:
        show(COLUMNS, rows, num_left=3)
        print(f"preflight: {world.size} of {world.size} ranks are ready")
    return 0


def seconds_of(text: str) -> float:
    """Return the positive number of seconds that an argument holds; raise ValueError if none."""
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise ValueError(f"--timeout-seconds: expected a positive number, got {text}")


@contextmanager
def ended_after(seconds: float, world: World) -> Iterator[None]:
    """End this process with a message after `seconds`.

    No exception reaches a thread that waits for a disk that hangs, or for a port where something
    else than a store listens.
    """

    def end() -> None:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        print(
            f"fastalign preflight: {here(world)}: no end in {seconds:g} seconds; is rank 0 at "
            f"{address} (MASTER_ADDR, MASTER_PORT), and does the disk of run.dir answer?",
            file=sys.stderr,
        )
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def preflight(config: TrainingConfig, world: World, seconds: float) -> list[tuple[str, ...]]:
    """Make all checks; return one row for each rank, with the cells that COLUMNS name.

    `seconds` limits the ranks' arrival, and each collective.

    Raises:
        RanksDiffer: if something is at fault, on every rank.
        RankFailed: if a rank is missing.
        ValueError: if this rank does not reach rank 0, or a sum over the ranks is wrong.
    """
    parallel = ParallelConfig(silence_seconds=seconds / 4)
    with open_world(world, timeout_seconds=seconds), watched_by_ranks(world, parallel):
        device, mine = facts_of(config, world)
        free, faults_of_folder = look_at_folder(Path(config.run.dir).expanduser(), world)
        mine |= {"free": free, "faults": mine["faults"] + faults_of_folder}
        facts = world.gather(mine)
        faults = faults_of(facts)
        if faults:
            raise RanksDiffer("; ".join(faults))
        check_sums(world, device)
    return [
        (
            str(rank),
            row["host"],
            row["device"],
            *(row["versions"][name] for name in PACKAGES),
            f"{row['free'] / 2**30:.1f} GiB",
        )
        for rank, row in enumerate(facts)
    ]


def facts_of(config: TrainingConfig, world: World) -> tuple[torch.device, Facts]:
    """Return the device of this rank, and the facts that ranks compare."""
    faults, gpu = [], None
    try:
        device = device_of_rank(config.train.device, world)
    except ValueError as error:
        device = torch.device("cpu")
        faults.append(str(error))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        gpu = str(torch.cuda.get_device_properties(device).uuid)
    settings = flat_settings(config_to_dict(config))
    settings.pop("run.dir")  # machines may mount one disk in different places
    return device, {
        "host": platform.node(),
        "device": str(device),
        "gpu": gpu,
        "faults": faults,
        "versions": {name: version(name) for name in PACKAGES},
        "settings": settings,
    }


def faults_of(facts: Sequence[Facts]) -> list[str]:
    """Return one message per inconsistency between ranks (versions, settings, shared GPU)."""
    hosts = {rank: str(found["host"]) for rank, found in enumerate(facts)}
    faults = []
    for fault in dict.fromkeys(fault for found in facts for fault in found["faults"]):
        ranks = [rank for rank, found in enumerate(facts) if fault in found["faults"]]
        faults.append(f"{named(ranks, hosts)}: {fault}")
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


def look_at_folder(folder: Path, world: World) -> tuple[int, list[str]]:
    """Write a file on rank 0 and look for it on the others; remove what was made.

    Returns:
        Bytes that are free on its disk, and one message for each fault.
    """
    word = world.of_first(secrets.token_hex(8))
    shared, own = folder / f".preflight-{word}", folder / f".preflight-{word}-{world.rank}"
    made: list[Path] = []
    faults, free = [], 0
    try:
        if world.is_first:
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            made = missing
            shared.touch()
    except OSError as error:
        faults.append(f"run.dir: {folder} cannot be written ({error.strerror})")
    if world.of_first(not faults):
        try:
            if appears(shared):
                own.touch()
                own.unlink()
                free = shutil.disk_usage(folder).free
            else:
                faults.append(
                    f"run.dir: {folder} is not shared: it does not hold the file that rank 0 wrote"
                )
        except OSError as error:
            faults.append(f"run.dir: {folder} cannot be written ({error.strerror})")
    world.barrier()  # all have looked
    with suppress(OSError):
        if world.is_first:
            shared.unlink()
        for path in made:
            path.rmdir()  # fails where a run has begun in it
    return free, faults


def appears(path: Path) -> bool:
    """Wait until a file that another machine wrote is seen here; return False if it is not."""
    end = time.monotonic() + MOST_LAG_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def check_sums(world: World, device: torch.device) -> None:
    """Sum over all ranks: by gloo, and on GPUs by NCCL.

    Raises:
        ValueError: if a sum is wrong, or NCCL fails.
    """
    for place in dict.fromkeys((torch.device("cpu"), device)) if world.size > 1 else ():
        number = torch.tensor(float(world.rank + 1), device=place)
        try:
            dist.all_reduce(number)
            total, expected = number.item(), world.size * (world.size + 1) / 2
        except (RuntimeError, ValueError) as error:
            if place.type == "cpu":
                raise  # a rank is missing
            reason = f"{first_line(error)} (NCCL_SOCKET_IFNAME)"
            raise ValueError(f"{here(world)}: a sum on {place}: {reason}") from error
        if total != expected:
            raise ValueError(
                f"{here(world)}: a sum on {place}: expected {expected:g}, got {total:g}"
            )
