"""Run each trainer in its own process, one turn of its training loop per request.

A turn lies between two ends of `optimizer.step()` in the trainer's own loop: logging, next batch,
forward, backward, clipping, step. torch's hook on optimisers stops all trainers at the same point
without changing their code.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.measure import CLEAR_REFS, resident_bytes
from benchmarks.step_cases import ModelShape, PPOCase
from fastalign.batch.packed import Group

# Turns before the first timed one; the second is the first complete one and counts tokens.
WARM_UP_TURNS = 2
PRELOADED = ["benchmarks.step_trainers", "fastalign.trainers", "trl.trainer.dpo_trainer"]


@dataclass(frozen=True)
class Job:
    """The inputs of a trainer.

    Attributes:
        policy: folder of the model to train.
        reference: folder of a second model: DPO's reference, or GAE's reward model.
        rows: JSON Lines file of the rows.
        groups: the same rows as token ids.
        shape: shape of the models.
        scratch: folder for the trainer's files.
        device: `cpu` or `cuda`.
        dtype: torch's name of the products' dtype.
        num_steps: length of the learning-rate schedule, which is never reached.
        num_threads: number of CPU threads.
        ppo: how an iteration of PPO samples and updates; None for other steps.
        packages: folder of packages that come before the environment's, or None.
    """

    policy: Path
    reference: Path
    rows: Path
    groups: list[Group]
    shape: ModelShape
    scratch: Path
    device: str
    dtype: str
    num_steps: int
    num_threads: int
    ppo: PPOCase | None = None
    packages: Path | None = None


class Finished(BaseException):
    """Raised to leave a trainer's loop; no trainer catches it."""


class Clock:
    """Ends, times and counts the turns of a trainer's loop.

    Attributes:
        first_loss: function that returns the loss of the first step; the trainer sets it.
        prologue: optional further work at the beginning of a turn.
        updates_per_turn: number of optimiser steps of a turn.
    """

    first_loss: Callable[[], float]
    prologue: Callable[[], object] | None = None
    updates_per_turn = 1

    def __init__(self, connection: Connection, device: str):
        self._connection = connection
        self._device = device
        self._num_updates = self._num_turns = self._num_tokens = 0
        self._start = 0.0
        self._resident = 0

    def watch(self) -> None:
        """Observe optimisers and count tokens; call it before models are built."""
        register_optimizer_step_post_hook(lambda *_: self.end_update())
        forward = torch.nn.Embedding.forward

        def counted(module: torch.nn.Embedding, input: torch.Tensor) -> torch.Tensor:
            self._num_tokens += input.numel()
            return forward(module, input)

        torch.nn.Embedding.forward = counted  # type: ignore[assignment, method-assign]
        if CLEAR_REFS.exists():
            self._resident = resident_bytes("VmRSS")

    def end_update(self) -> None:
        """End the turn if this optimiser step is its last."""
        self._num_updates += 1
        if self._num_updates % self.updates_per_turn == 0:
            self.end_turn()

    def end_turn(self, seconds: float | None = None) -> None:
        """Send the turn's time, wait for the next request, and begin a turn.

        `seconds` is the time of a turn that did only a part of its work; None: that of the clock.
        """
        self._synchronise()
        if seconds is None:
            seconds = time.perf_counter() - self._start
        self._num_turns += 1
        if self._num_turns == WARM_UP_TURNS:
            self._connection.send((self.first_loss(), self._num_tokens))
            self._reset_peak()
        elif self._num_turns > WARM_UP_TURNS:
            self._connection.send((seconds, self._peak()))
        if self._num_turns >= WARM_UP_TURNS and not self._connection.recv():
            raise Finished
        self._num_tokens = 0
        self._start = time.perf_counter()
        if self.prologue is not None:
            self.prologue()

    def _synchronise(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _reset_peak(self) -> None:
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif CLEAR_REFS.exists():
            CLEAR_REFS.write_text("5", encoding="ascii")

    def _peak(self) -> int | None:
        if self._device == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return resident_bytes("VmHWM") - self._resident if CLEAR_REFS.exists() else None


Trainer = Callable[[Job, Clock], None]


def serve(trainer: Trainer, job: Job, connection: Connection) -> None:
    """Run a trainer in this process, with its output in a file."""
    log = os.open(job.scratch / "output.txt", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(job.num_threads)
    if job.packages is not None:
        sys.path.insert(0, str(job.packages))
    try:
        trainer(job, Clock(connection, job.device))
    except Finished:
        pass
    except Exception:
        traceback.print_exc()
        raise
    finally:
        connection.close()


class Worker:
    """A trainer in its process.

    Attributes:
        loss: loss of its first step.
        num_tokens: number of tokens that went through the blocks in one turn.
    """

    def __init__(self, name: str, trainer: Trainer, job: Job):
        # CUDA cannot be used after a fork; on a CPU, forks save the imports, but not to a job that
        # has packages of its own.
        method = "spawn" if job.device == "cuda" or job.packages else "forkserver"
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(PRELOADED)
        self._name, self._log = name, job.scratch / "output.txt"
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(trainer, job, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.loss, self.num_tokens = self._answer()

    def turn(self) -> tuple[float, int | None]:
        """Run a turn; return its seconds and the peak memory of all timed turns so far in bytes."""
        self._connection.send(True)
        seconds, peak = self._answer()
        return seconds, peak

    def stop(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._connection.send(False)
        self._process.join()
        self._connection.close()

    def _answer(self) -> tuple[Any, Any]:
        try:
            answer: tuple[Any, Any] = self._connection.recv()
        except EOFError:
            self._process.join()
            output = self._log.read_text(encoding="utf-8", errors="replace")
            raise SystemExit(f"{self._name} ended early:\n{output[-4000:]}") from None
        return answer
