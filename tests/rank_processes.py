"""Runs of several ranks, each a real process with gloo between them.

They are forked from a server that has imported everything already: a start takes a moment. The
store where they meet is this process's, as it is the agent's under `torchrun`.
"""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

SECONDS = 240.0  # that ranks may take in all; far more than any test needs
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


@dataclass(frozen=True)
class Ranks:
    """Started ranks.

    Attributes:
        processes: by rank.
        logs: what each prints, errors among it.
        store: where they meet.
    """

    processes: Sequence[BaseProcess]
    logs: Sequence[Path]
    store: TCPStore

    def join(self) -> list[int | None]:
        """Exit codes when all have ended; those that do not are killed."""
        for process in self.processes:
            process.join(SECONDS)
        for process in self.processes:
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def output(self, rank: int) -> str:
        return self.logs[rank].read_text(errors="replace")


def start(
    num_ranks: int,
    folder: Path,
    target: Callable[..., None],
    *arguments: Any,
    first_holds_store: bool = False,
) -> Ranks:
    """Starts `target(*arguments)` on every rank; logs go to the folder."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = free_port() if first_holds_store else store.port
    folder.mkdir(exist_ok=True)
    logs = [folder / f"rank-{rank}.log" for rank in range(num_ranks)]
    processes: list[BaseProcess] = []
    for rank, log in enumerate(logs):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks}
        meeting = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": str(not first_holds_store),
        }
        cache = {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", "")}
        environment = {name: str(value) for name, value in (place | meeting | cache).items()}
        process = CONTEXT.Process(target=_run, args=(environment, log, target, arguments))
        process.start()
        processes.append(process)
    return Ranks(processes, logs, store)


def run(num_ranks: int, folder: Path, target: Callable[..., None], *arguments: Any) -> list[str]:
    """The ranks' outputs, when all have ended well."""
    ranks = start(num_ranks, folder, target, *arguments)
    codes = ranks.join()
    outputs = [ranks.output(rank) for rank in range(num_ranks)]
    assert codes == [0] * num_ranks, "\n".join([str(codes), *outputs])
    return outputs


def torchrun(num_ranks: int, folder: Path, module: str, *arguments: str) -> Ranks:
    """`torchrun -m MODULE ...` as a process that starts the ranks, which are new programs."""
    options = ["--standalone", "--nproc-per-node", str(num_ranks), "-m", module]
    return start(1, folder, _agent, [*options, *arguments])


def in_turn(target: Callable[[Any], object], arguments: Sequence[Any]) -> None:
    """Call `target` once for each argument, in groups numbered as torchrun's restarts are."""
    for number, argument in enumerate(arguments):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        target(argument)


def command(*arguments: str) -> None:
    """`fastalign ...`, as its script runs it."""
    from fastalign.cli.main import console

    sys.argv = ["fastalign", *arguments]
    console()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


def _agent(arguments: list[str]) -> None:
    from torch.distributed.run import main

    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    main(arguments)


def _run(
    environment: dict[str, str], log: Path, target: Callable[..., None], arguments: Sequence[Any]
) -> None:
    os.environ.update(environment)
    if not os.environ["XDG_CACHE_HOME"]:  # the server may have been forked with that of a test
        del os.environ["XDG_CACHE_HOME"]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under `nohup`
    target(*arguments)
