"""vLLM in a process of its own, on this machine: it may die, stop or hang, and the trainer lives.

The process is started from the command line, so a script without a main guard may use it; nothing
of it is on disk: the pipe is a socket pair, weights go through memory that has no name.
"""

import json
import mmap
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.ranks.whole_weights import whole
from fastalign.rollouts.engines.params import require_vllm
from fastalign.rollouts.engines.spec import EngineSpec
from fastalign.rollouts.engines.weights import fit_tensors, write_config
from fastalign.rollouts.sampler import Completion, SamplerFailed, SamplingParams

BUCKET_BYTES = 2**28  # of shared memory, or the largest tensor if that is more
ALIGNMENT = 64


def engine_environment() -> dict[str, str]:
    """The trainer's, but for what `torchrun` says of the trainer's rank: an engine has its own."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
    places = ("MASTER_ADDR", "MASTER_PORT", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in (*ours, *places) and not name.startswith("TORCHELASTIC_")
    }
    # Threads that wait by spinning would take the trainer's cores.
    return {"OMP_WAIT_POLICY": "PASSIVE", **kept}


class VllmProcessSampler:
    """Samples by an engine in a process of its own; arguments as those of `VllmSampler`.

    Raises:
        ValueError: vLLM is not installed, or has not this architecture or these settings.
        SamplerFailed: the engine could not be built in time.
    """

    def __init__(self, spec: EngineSpec, *, on_progress: Callable[[int], None] | None = None):
        require_vllm()
        if sys.platform != "linux":
            raise ValueError(f"sampler: vllm-process needs Linux, got {sys.platform}")
        self._spec, self._on_progress = spec, on_progress
        self._options = spec.options
        largest = max(torch.Size(shape).numel() for shape in spec.shapes.values())
        self._memory_bytes = max(BUCKET_BYTES, 4 * largest)  # weights are float32 at most
        self.version: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    @property
    def process_id(self) -> int:
        """Of the engine's process."""
        assert self._process is not None
        return self._process.pid

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        """See `VllmSampler.generate`; an engine that is dead or silent is a `SamplerFailed` too."""
        self._spec.check(prompt_ids, params)
        prompts = [list(ids) for ids in prompt_ids]
        found = self._ask(do="generate", prompts=prompts, params=asdict(params), seed=seed)
        return [[Completion(**completion) for completion in answers] for answers in found]

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `VllmSampler.sync_weights`; at most a bucket is in memory beside the weights."""
        tensors = fit_tensors(named_tensors, self._spec.shapes)
        self.version = None
        self._send(do="sync_weights", version=version)
        self._send_tensors(tensors)
        self._result()
        self.version = version

    def sync_adapter(self, folder: str | Path, version: int) -> None:
        """See `VllmSampler.sync_adapter`."""
        self._ask(do="sync_adapter", folder=str(folder), version=version)
        self.version = version

    def differing_tensors(
        self, named_tensors: Iterable[tuple[str, Tensor]]
    ) -> tuple[list[str], int]:
        """Which of these the engine does not compute with, and how many could be compared."""
        self._send(do="differing_tensors")
        self._send_tensors(dict(named_tensors))
        names, num_compared = self._result()
        return names, num_compared

    def sleep(self) -> None:
        """Nothing: an engine of its own keeps its memory."""

    def rebuild(self) -> None:
        """A new engine in place of a dead one; it has no weights yet."""
        self.close()
        self._start()

    def close(self) -> None:
        """Ends the process; a stopped one too."""
        if self._process is None:
            return
        self._pipe.close()
        self._memory.close()
        self._process.kill()
        self._process.wait()
        self._process, self.version = None, None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        # A stopped process reads nothing: a full pipe must not hold the trainer for ever.
        limit = struct.pack("ll", int(self._options.silence_seconds) + 1, 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        with tempfile.TemporaryDirectory() as folder:
            write_config(self._spec.config, folder)
            memory_number = os.memfd_create("fastalign-weights")
            os.ftruncate(memory_number, self._memory_bytes)
            self._memory = mmap.mmap(memory_number, self._memory_bytes)
            text = json.dumps(self._settings())
            Path(folder, "engine.json").write_text(text, encoding="utf-8")
            numbers = [str(theirs.fileno()), str(memory_number)]
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "fastalign.rollouts.engines.child"),
                    *(*numbers, folder, str(os.getpid())),
                ],
                pass_fds=(theirs.fileno(), memory_number),
                stdin=subprocess.DEVNULL,
                env=engine_environment(),
            )
            theirs.close()
            os.close(memory_number)
            self._pipe = Connection(ours.detach())
            try:
                self._result(self._options.start_seconds, "did not start")
            except BaseException:
                self.close()
                raise

    def _settings(self) -> dict[str, Any]:
        """The spec, as JSON holds it; the configuration is a file of its own."""
        spec = self._spec
        return {
            "eos_token_ids": list(spec.eos_token_ids),
            "dtype": str(spec.dtype).removeprefix("torch."),
            "max_length": spec.max_length,
            "options": asdict(spec.options),
            "lora_rank": spec.lora_rank,
        }

    def _send_tensors(self, tensors: dict[str, Tensor]) -> None:
        """All of them, through the shared memory, a bucket at a time, and an empty one."""
        bucket: list[Any] = []
        place = 0
        for name, sharded in tensors.items():
            tensor = whole(sharded).contiguous()
            size = tensor.numel() * tensor.element_size()
            if bucket and place + size > self._memory_bytes:
                self._hand_over(bucket)
                bucket, place = [], 0
            flat = torch.frombuffer(
                self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=place
            )
            flat.copy_(tensor.view(-1))
            dtype = str(tensor.dtype).removeprefix("torch.")
            bucket.append((name, dtype, list(tensor.shape), place))
            place += -(-size // ALIGNMENT) * ALIGNMENT
            del flat  # memory with a view on it cannot be closed
        if bucket:
            self._hand_over(bucket)
        self._send(bucket=[])

    def _hand_over(self, bucket: list[Any]) -> None:
        self._send(bucket=bucket)
        self._receive("taken", self._options.silence_seconds, "took no weights")

    def _ask(self, **request: Any) -> Any:
        self._send(**request)
        return self._result()

    def _send(self, **message: Any) -> None:
        if self._process is None:
            raise SamplerFailed("sampler: the engine is closed")
        try:
            self._pipe.send_bytes(json.dumps(message).encode())
        except BlockingIOError as error:
            seconds = self._options.silence_seconds
            raise self._failure(f"read nothing for {seconds:g} seconds") from error
        except OSError as error:
            raise self._failure(f"is gone ({self._how_it_ended()})") from error

    def _result(self, seconds: float | None = None, what: str = "showed no progress") -> Any:
        limit = self._options.silence_seconds if seconds is None else seconds
        return self._receive("result", limit, what)

    def _receive(self, wanted: str, seconds: float, what: str) -> Any:
        """The next message of this kind; progress in between starts the time anew."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise self._failure(f"{what} for {seconds:g} seconds")
                message = json.loads(self._pipe.recv_bytes())
            except (EOFError, ConnectionResetError) as error:
                raise self._failure(f"is gone ({self._how_it_ended()})") from error
            if wanted in message:
                return message[wanted]
            if "refused" in message:
                raise ValueError(message["refused"])
            if "failed" in message:
                raise SamplerFailed(message["failed"])
            if self._on_progress is not None:
                self._on_progress(message["progress"])
            deadline = time.monotonic() + seconds

    def _failure(self, what: str) -> SamplerFailed:
        """An engine that failed once is used no more: a late answer would be taken for another."""
        assert self._process is not None
        self._process.kill()
        self.version = None
        return SamplerFailed(f"sampler: the engine's process {self._process.pid} {what}")

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its pipe is closed"
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
