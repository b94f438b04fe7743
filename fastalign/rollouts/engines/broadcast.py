"""Weights over a network: a process group in which the trainer is rank 0 and workers the others.

It uses NCCL between GPUs and gloo otherwise. Trainer and vLLM each have a default group already,
so this one is made from a store and used by its own methods.
"""

import json
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.ranks.whole_weights import whole
from fastalign.rollouts.engines.connection import ServerConnection
from fastalign.rollouts.engines.weights import Tally
from fastalign.rollouts.sampler import SamplerFailed


def open_group(store: Any, rank: int, size: int, device: torch.device, seconds: float) -> Any:
    """Return the group of the trainer and all workers; every rank calls this at the same time."""
    timeout = timedelta(seconds=seconds)
    if device.type != "cuda":
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    torch.cuda.set_device(device)
    return dist.ProcessGroupNCCL(store, rank, size, options)


def join_group(
    host: str, port: int, rank: int, size: int, device: torch.device, seconds: float
) -> Any:
    """Join the group of a `Broadcaster` as a worker."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, size, False, timedelta(seconds=seconds), wait_for_workers=False
    )
    return open_group(store, rank, size, device, seconds)


def receive(group: Any, description: str, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that the trainer sends, in the order of `describe`."""
    for name, dtype, shape in json.loads(description):
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        group.broadcast(tensor, 0).wait()
        yield name, tensor


def describe(tensors: Mapping[str, Tensor]) -> str:
    """Return names, dtypes and shapes as JSON."""
    return json.dumps(
        [
            [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for name, tensor in tensors.items()
        ]
    )


class Broadcaster:
    """Sender of weights to a server's workers; it holds one gathered tensor at a time.

    Args:
        server: server whose workers have `WorkerExtension`.
        host: this machine's address for the server; None: the address that leads to the server.
        device: device of the tensors; NCCL is used if this and the workers' are GPUs.
        seconds: time limit of one transfer.

    Raises:
        SamplerFailed: if the workers do not join in time.
    """

    def __init__(
        self, server: ServerConnection, host: str | None, device: torch.device, seconds: float
    ):
        self._server = server
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="broadcast")
        workers = json.loads(server.call("workers"))
        on_gpu = device.type == "cuda" and workers["device"] == "cuda"
        self._device = device if on_gpu else torch.device("cpu")
        host, size = host or address_towards(server.url), 1 + workers["number"]
        with socket.create_server((host, 0)) as listener:  # listens at this address alone
            port = listener.getsockname()[1]
            self._store = dist.TCPStore(  # type: ignore[attr-defined]
                host,
                port,
                size,
                True,
                timedelta(seconds=seconds),
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        arguments = (host, str(port), str(size), self._device.type, str(seconds))
        joined = self._threads.submit(server.call_all, "join", *arguments)
        try:
            self._group = open_group(self._store, 0, size, self._device, seconds)
        except RuntimeError as error:
            raise SamplerFailed(
                f"sampler: the server's workers cannot be reached: {error}"
            ) from error
        joined.result()

    def send(self, tensors: Mapping[str, Tensor], name: str, sent: Tally) -> list[str]:
        """Send these weights to the workers under a name; return the workers' answers.

        Raises:
            SamplerFailed: if a worker is gone, or did not take all of them.
        """
        taken = self._threads.submit(self._server.call_all, "receive", describe(tensors), name)
        try:
            for _, tensor in sent.through((n, whole(t)) for n, t in tensors.items()):
                self._group.broadcast(tensor.to(self._device).contiguous(), 0).wait()
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise SamplerFailed(f"sampler: a worker of the server is gone: {first}") from error
        return taken.result()

    def close(self) -> None:
        """Leave the group."""
        self._threads.shutdown(wait=False)
        self._group = None


def address_towards(url: str) -> str:
    """Return this machine's address on the route to a server."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=30) as connection:
        return str(connection.getsockname()[0])
