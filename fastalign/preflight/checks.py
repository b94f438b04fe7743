"""Whether a run on several processes can start, found out within a minute instead of in its hours.

Every check is made by every rank; rank 0 compares, and all leave with the same verdict.
"""

import platform
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from fastalign.preflight.meeting import ARRIVAL_SHARE, Deadline, Facts, Meeting, named, within
from fastalign.preflight.shared_folder import SharedFolder
from fastalign.ranks.world import World
from fastalign.runs.config import AnyConfig, config_to_dict
from fastalign.runs.folder import flat_settings
from fastalign.runs.open import device_of_rank

PACKAGES = ("torch", "fastalign", "transformers")
COLUMNS = ("rank", "host", "device", *PACKAGES, "free in run.dir")
SUM_SHARE = 0.9  # of the time, for the rounds behind the arrival


def preflight(config: AnyConfig, world: World, meeting: Meeting, deadline: Deadline) -> list[Facts]:
    """Makes all checks.

    Returns:
        On rank 0 a row for each rank: what COLUMNS name; on the others nothing.

    Raises:
        Disagreement: what is at fault, on every rank.
        ValueError: this rank alone knows, since it does not reach rank 0.
    """
    device, mine = facts_of(config, world)
    found = meeting.agree("facts", mine, faults_of, share=ARRIVAL_SHARE)
    folder = Path(config.run.dir).expanduser()
    with SharedFolder(folder, world, meeting) as shared:
        disks = meeting.agree("folder", shared.look(deadline), shared.faults_of, share=SUM_SHARE)

    def judge(rows: list[Facts]) -> list[str]:
        return [
            f"{named([rank], meeting.hosts)}: {row['fault']}"
            for rank, row in enumerate(rows)
            if row["fault"]
        ]

    fault = fault_of_sums(world, meeting.store, device, deadline)
    meeting.agree("sums", {"fault": fault}, judge, share=SUM_SHARE)
    return [a | b for a, b in zip(found, disks, strict=True)]


def facts_of(config: AnyConfig, world: World) -> tuple[torch.device, Facts]:
    """The device of this rank, and what rank 0 compares."""
    fault = ""
    try:
        device = device_of_rank(config.train.device, world)
    except ValueError as error:
        device, fault = torch.device("cpu"), str(error)
    gpu = None
    if device.type == "cuda":
        gpu = str(torch.cuda.get_device_properties(device).uuid)
    settings = flat_settings(config_to_dict(config))
    settings.pop("run.dir")  # machines may mount one disk in different places
    return device, {
        "host": platform.node(),
        "size": world.size,
        "device": str(device),
        "gpu": gpu,
        "fault": fault,
        "versions": {name: version(name) for name in PACKAGES},
        "settings": settings,
    }


def faults_of(facts: Sequence[Facts]) -> list[str]:
    """What keeps these ranks from running together."""
    hosts = {rank: str(found["host"]) for rank, found in enumerate(facts)}
    faults = [
        f"{named([rank], hosts)}: {found['fault']}"
        for rank, found in enumerate(facts)
        if found["fault"]
    ]
    faults += differing("WORLD_SIZE", [str(found["size"]) for found in facts], hosts)
    for package in PACKAGES:
        faults += differing(package, [found["versions"][package] for found in facts], hosts)
    if not faults:
        kinds = [str(found["device"]).partition(":")[0] for found in facts]
        faults += differing("train.device", kinds, hosts)
    names = sorted(set().union(*(found["settings"] for found in facts)))
    for name in names:
        values = [repr(found["settings"].get(name)) for found in facts]
        faults += differing(name, values, hosts)
    places = [(found["host"], found["gpu"]) for found in facts]
    for place, number in Counter(places).items():
        if number > 1 and place[1] is not None:
            ranks = [rank for rank, other in enumerate(places) if other == place]
            faults.append(f"{named(ranks, hosts)} have one GPU ({facts[ranks[0]]['device']})")
    return faults


def differing(what: str, values: Sequence[str], hosts: dict[int, str]) -> list[str]:
    """One fault, where not all ranks have rank 0's value."""
    others = [rank for rank, value in enumerate(values) if value != values[0]]
    if not others:
        return []
    told = ", ".join(sorted({values[rank] for rank in others}))
    return [f"{what}: {values[0]} on rank 0 on {hosts[0]}, but {told} on {named(others, hosts)}"]


def fault_of_sums(
    world: World, store: Store, device: torch.device, deadline: Deadline
) -> str | None:
    """What is wrong with a sum over all ranks: gloo's, and NCCL's where the run is on GPUs."""
    if world.size == 1:
        return None
    seconds = deadline.left(SUM_SHARE)

    def summed() -> str | None:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        timeout = timedelta(seconds=seconds)
        group = PrefixStore("group", store)
        dist.init_process_group(
            backend, store=group, rank=world.rank, world_size=world.size, timeout=timeout
        )
        for place in dict.fromkeys((torch.device("cpu"), device)):
            number = torch.tensor(float(world.rank + 1), device=place)
            dist.all_reduce(number)
            expected = world.size * (world.size + 1) / 2
            if number.item() != expected:
                return f"a sum on {place}: expected {expected:g}, got {number.item():g}"
        dist.destroy_process_group()
        return None

    try:
        return within(seconds, "a sum over all ranks", summed)
    except (ValueError, RuntimeError) as error:  # torch's own errors are the latter
        return f"{str(error).strip().splitlines()[0]} (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"


def table(rows: Sequence[Facts]) -> list[tuple[str, ...]]:
    """Rows under COLUMNS."""
    return [
        (
            str(rank),
            row["host"],
            row["device"],
            *(row["versions"][name] for name in PACKAGES),
            f"{row['free'] / 2**30:.1f} GiB",
        )
        for rank, row in enumerate(rows)
    ]
