"""Weights over a network: a process group in which the trainer is rank 0 and workers the others.

It uses NCCL between GPUs and gloo otherwise. Trainer and vLLM each have a default group already,
so this one is made from a store and used by its own methods.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.rollouts.engines.connection import ServerConnection
from fastalign.rollouts.engines.weights import to_host
from fastalign.rollouts.sampler import SamplerFailed

# Added to the time limit for NCCL's own watchdog, which is to find that the group was aborted.
WATCHDOG_SECONDS = 600.0
ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
CLEAN_UP_ONLY = "2"  # its value with which the watchdog does not end the process
POLL_SECONDS = 0.001
# A worker that fails leaves the group a moment before its server says why.
ANSWER_SECONDS = 2.0
# Name, dtype by torch's name without `torch.`, and shape of a tensor.
Description = tuple[str, str, list[int]]


class WeightGroup:
    """The group of the trainer and all workers, in which each wait has a time limit.

    The `wait` of gloo blocks, for the group's time limit at most. That of NCCL returns at once,
    and neither the making of its communicator nor a transfer to a dead process ever ends; so a
    transfer is begun on a thread of its own, and polled.

    Args:
        inner: process group of torch.
        device: device of the tensors.
        seconds: time limit of one transfer.
    """

    def __init__(self, inner: Any, device: torch.device, seconds: float):
        self.inner, self.device, self._seconds = inner, device, seconds

    def broadcast(self, tensor: Tensor, is_over: Callable[[], bool] = lambda: False) -> None:
        """Give a tensor of rank 0 to all ranks, and wait until it is there.

        Args:
            tensor: the same shape and dtype on every rank, on the group's device.
            is_over: returns True when a rank is known to have failed.

        Raises:
            RuntimeError: if a rank is gone, or does not take it in time; the group is of no use
                then.
        """
        if self.device.type != "cuda":
            self.inner.broadcast(tensor, 0).wait()
            return
        given_up, failures = threading.Event(), list[RuntimeError]()
        stream = stream_of(self.device)

        def transfer() -> None:
            try:
                with stream:
                    work = self.inner.broadcast(tensor, 0)
                    while not work.is_completed() and not given_up.wait(POLL_SECONDS):
                        pass
                    if not given_up.is_set():
                        work.wait()
            except RuntimeError as error:
                failures.append(error)

        thread = threading.Thread(target=transfer, name="broadcast", daemon=True)
        thread.start()
        deadline = time.monotonic() + self._seconds
        while thread.is_alive():
            thread.join(10 * POLL_SECONDS)
            over = is_over()
            if thread.is_alive() and (over or time.monotonic() > deadline):
                given_up.set()
                self.inner.abort()  # or the GPU would wait for it for ever
                raise RuntimeError(
                    "it ended" if over else f"no transfer in {self._seconds:g} seconds"
                )
        if failures:
            raise failures[0]


def stream_of(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which another thread uses this thread's stream of a GPU."""
    found: AbstractContextManager[Any] = torch.cuda.stream(torch.cuda.current_stream(device))
    return found


@contextmanager
def surviving_watchdog() -> Iterator[None]:
    """Have the NCCL groups that are made here abort what hangs, and leave the process alive."""
    before = os.environ.get(ERROR_HANDLING)
    os.environ[ERROR_HANDLING] = CLEAN_UP_ONLY  # a group reads it when it is made
    try:
        yield
    finally:
        if before is None:
            del os.environ[ERROR_HANDLING]
        else:
            os.environ[ERROR_HANDLING] = before


def open_group(
    store: Any, rank: int, size: int, device: torch.device, seconds: float
) -> WeightGroup:
    """Return the group of the trainer and all workers; every rank calls this at the same time."""
    timeout = timedelta(seconds=seconds)
    if device.type != "cuda":
        return WeightGroup(dist.ProcessGroupGloo(store, rank, size, timeout), device, seconds)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout + timedelta(seconds=WATCHDOG_SECONDS)
    torch.cuda.set_device(device)
    with surviving_watchdog():
        inner = dist.ProcessGroupNCCL(store, rank, size, options)
    return WeightGroup(inner, device, seconds)


def join_group(
    host: str, port: int, rank: int, size: int, device: torch.device, seconds: float
) -> WeightGroup:
    """Join the group of a `Broadcaster` as a worker."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, size, False, timedelta(seconds=seconds), wait_for_workers=False
    )
    return open_group(store, rank, size, device, seconds)


def receive(group: WeightGroup, description: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that the trainer sends, in the order of their descriptions in JSON."""
    for name, dtype, shape in json.loads(description):
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=group.device)
        group.broadcast(tensor)
        yield name, tensor


def gpu_of(device: torch.device) -> str:
    """Return the id of a GPU, the same in every process; an empty text for another device."""
    if device.type != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


class Broadcaster:
    """Sender of weights to a server's workers.

    Args:
        server: server whose workers have `WorkerExtension`.
        workers: what each worker answered to `workers`.
        host: this machine's address for the server; None: the address that leads to the server.
        device: device of the tensors; NCCL is used if this and the workers' are GPUs.
        seconds: time limit of one transfer.

    Raises:
        ValueError: if a worker has the trainer's GPU, which NCCL takes once.
        SamplerFailed: if the workers do not join in time.
    """

    def __init__(
        self,
        server: ServerConnection,
        workers: Sequence[dict[str, Any]],
        host: str | None,
        device: torch.device,
        seconds: float,
    ):
        self._server = server
        on_gpu = device.type == "cuda" and workers[0]["device"] == "cuda"
        device = device if on_gpu else torch.device("cpu")
        shared = {worker["gpu"] for worker in workers} & {gpu_of(device)} - {""}
        if shared:
            raise ValueError(
                f"vllm.transport: {server.name} and the trainer share the GPU {shared.pop()}, "
                "where NCCL sends nothing; expected --vllm.transport files, or another GPU for one "
                "of them (CUDA_VISIBLE_DEVICES)"
            )
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="broadcast")
        self._taken: Future[list[str]] = Future()
        host, size = host or address_towards(server.url), 1 + workers[0]["number"]
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
        arguments = (host, str(port), str(size), device.type, str(seconds))
        joined = self._threads.submit(server.call_all, "join", *arguments)
        try:
            self.group = open_group(self._store, 0, size, device, seconds)
        except RuntimeError as error:
            raise SamplerFailed(
                f"sampler: the workers of {server.name} cannot be reached: {error}"
            ) from error
        joined.result()

    def begin(self, tensors: Sequence[Description], name: str) -> None:
        """Have the workers wait for these tensors, and take them over under a name."""
        text = json.dumps(tensors)
        self._taken = self._threads.submit(self._server.call_all, "receive", text, name)

    def send(self, tensor: Tensor) -> None:
        """Send the next tensor to the workers.

        Raises:
            SamplerFailed: if a worker is gone, or does not take it in time.
        """
        if self._has_failed():
            self.end()
        device = self.group.device
        ready = tensor.contiguous() if device.type == "cuda" else to_host(tensor)
        try:
            self.group.broadcast(ready.to(device), self._has_failed)
        except RuntimeError as error:
            wait([self._taken], ANSWER_SECONDS)
            if self._has_failed():
                self.end()  # raises what the worker says
            first = str(error).strip().splitlines()[0]
            raise SamplerFailed(
                f"sampler: a worker of {self._server.name} is gone: {first}"
            ) from error

    def end(self) -> list[str]:
        """Return the workers' answers when they have taken all.

        Raises:
            SamplerFailed: if one did not.
        """
        return self._taken.result()

    def close(self) -> None:
        """Leave the group."""
        self._threads.shutdown(wait=False)
        del self.group

    def _has_failed(self) -> bool:
        return self._taken.done() and self._taken.exception() is not None


def address_towards(url: str) -> str:
    """Return this machine's address on the route to a server."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=30) as connection:
        return str(connection.getsockname()[0])
