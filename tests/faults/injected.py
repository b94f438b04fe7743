"""What a run's process does to itself: each is installed in a child before its command begins."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from fastalign.cli import main as cli
from fastalign.rollouts.transformers_sampler import PolicySampler
from fastalign.runs import accumulate, loop
from fastalign.runs import open as opening
from fastalign.runs.checkpoint.writer import CheckpointWriter, ShardWriter
from fastalign.trainers.dpo import reference
from fastalign.trainers.dpo import train as dpo
from fastalign.trainers.ppo import train as ppo_train
from tests import rank_processes as ranks
from tests.runs.checkpoint.checkpoint_killer import kill_before

MicroBatch = Literal["first", "middle", "last"]
Where = Literal["setup", "batch", "rollout", "behind", "save", "leave", "end", "parting"]


class Fault(Protocol):
    """Something that goes wrong on one rank; None: on all."""

    rank: int | None

    def install(self) -> None: ...


@dataclass
class Now:
    """Where the process is: the step from 1, the micro-batch from 0, how many there are."""

    step: int = 0
    batch: int = 0
    count: int = 0

    def is_at(self, which: MicroBatch) -> bool:
        assert which != "middle" or self.count > 2, self
        return self.batch == {"first": 0, "middle": self.count // 2, "last": self.count - 1}[which]


NOW = Now()


def run(faults: Sequence[Fault], alone: bool, arguments: Sequence[str]) -> None:
    """`fastalign ...` with the faults of this rank; `alone`: as without torchrun."""
    rank = int(os.environ["RANK"])
    if alone:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    for fault in faults:
        if fault.rank in (None, rank):
            fault.install()
    cli.SECONDS_FOR_RANK_0 = 0  # no torchrun ends the others when one prints its error
    count_steps()  # around the faults, which go by it
    ranks.command(*arguments)


def around(owner: Any, name: str, before: Callable[..., None]) -> None:
    """Has `before` run with the arguments of every call, in front of it."""
    plain = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        before(*arguments, **options)
        return plain(*arguments, **options)

    setattr(owner, name, wrapped)


def count_steps() -> None:
    def begin(step: Any, run: Any) -> None:
        NOW.step, NOW.batch = run.state.step + 1, -1

    plain = accumulate.packed_batches

    def counted(*arguments: Any, **options: Any) -> list[Any]:
        pieces = list(plain(*arguments, **options))
        NOW.batch, NOW.count = -1, len(pieces)
        return pieces

    def next_batch(*_: Any, **__: Any) -> None:
        NOW.batch += 1

    around(loop.Step, "__init__", begin)
    setattr(accumulate, "packed_batches", counted)  # noqa: B010
    around(accumulate, "loss_of_batch", next_batch)


@dataclass(frozen=True)
class Poison:
    """A micro-batch's loss, or its gradient, is multiplied by a number, such as NaN.

    Attributes:
        step: in which, from 1.
        value: the factor.
        what: where.
        batch: in which micro-batch.
        rank: of the run.
        once: the step's later updates are spared, where it has several.
    """

    step: int
    value: float
    what: Literal["loss", "gradient"] = "loss"
    batch: MicroBatch = "first"
    rank: int | None = 0
    once: bool = False

    def install(self) -> None:
        plain, done = accumulate.loss_of_batch, []

        def poisoned(*arguments: Any) -> Any:
            part, sums = plain(*arguments)
            here = NOW.step == self.step and NOW.is_at(self.batch) and torch.is_grad_enabled()
            if here and not (self.once and done):
                done.append(NOW.step)
                if self.what == "loss":
                    part = part * self.value
                else:
                    part.register_hook(lambda gradient: gradient * self.value)
            return part, sums

        setattr(accumulate, "loss_of_batch", poisoned)  # noqa: B010


@dataclass(frozen=True)
class FarApart:
    """The sampler's log-probs of a step's tokens are lower than they were: ratios overflow.

    Attributes:
        step: in which, from 1.
        by: by how much.
        rank: of the run.
    """

    step: int
    by: float
    rank: int | None = 0

    def install(self) -> None:
        plain = ppo_train.ppo_loss_fn

        def apart(old_logprob: Any, *arguments: Any, **options: Any) -> Any:
            lower = self.by if NOW.step == self.step else 0.0
            return plain(old_logprob - lower, *arguments, **options)

        setattr(ppo_train, "ppo_loss_fn", apart)  # noqa: B010


@dataclass(frozen=True)
class Happens:
    """An event at a moment of a run.

    Attributes:
        what: the event.
        where: setup: the data is read; batch: a micro-batch; rollout: completions are sampled;
            behind: a step is over; save: a checkpoint's files are written, by a thread of its own;
            leave: the loop is left; end: the final model is written; parting: the ranks part.
        step: in which, or the save of which; from 1.
        batch: in which micro-batch.
        rank: on which.
    """

    what: Callable[[], None]
    where: Where = "batch"
    step: int = 0
    batch: MicroBatch = "first"
    rank: int | None = 0

    def install(self) -> None:
        def now(*arguments: Any, **options: Any) -> None:
            if self.where == "save":
                due = arguments[0].final.name == f"step-{self.step:06d}"
            elif self.where == "batch":
                due = NOW.step == self.step and NOW.is_at(self.batch)
            else:
                due = NOW.step == self.step
            if due:
                self.what()

        owners: dict[str, tuple[Any, str]] = {
            "setup": (dpo, "load_sets"),
            "batch": (accumulate, "loss_of_batch"),
            "rollout": (PolicySampler, "generate"),
            "save": (ShardWriter, "write_data"),
            "behind": (loop.Run, "_close_step"),
            "leave": (CheckpointWriter, "close"),
            "end": (loop, "save_final_model"),
            "parting": (opening, "part_from_ranks"),
        }
        around(*owners[self.where], now)


@dataclass(frozen=True)
class Sent:
    """A signal to this process itself; one that can be handled has been when this returns."""

    number: signal.Signals

    def __call__(self) -> None:
        os.kill(os.getpid(), self.number)
        if self.number == signal.SIGSTOP:
            threading.Event().wait()  # a thread may run on for a moment


@dataclass(frozen=True)
class UntilWritten:
    """Holds a process up until files hold a text; says so in another file, if it is to."""

    files: Sequence[Path]
    text: bytes
    waits: Path | None = None

    def __call__(self) -> None:
        if self.waits is not None:
            self.waits.write_text("waits")
        while not all(f.exists() and self.text in f.read_bytes() for f in self.files):
            pass


@dataclass(frozen=True)
class NaNReference:
    """The reference's log-probs of one pair are NaN on every rank."""

    pair: int
    rank: int | None = None

    def install(self) -> None:
        plain = reference.sequence_logprobs

        def spoiled(*arguments: Any, **options: Any) -> Any:
            found = plain(*arguments, **options)
            found[self.pair] = found[self.pair] * torch.nan
            return found

        setattr(reference, "sequence_logprobs", spoiled)  # noqa: B010


@dataclass(frozen=True)
class KilledInSave:
    """The process dies in its first save, before the file operation of that number, from 0."""

    operation: int
    folder: Path
    rank: int | None = 0

    def install(self) -> None:
        def begin(*_: Any) -> None:
            if self.operation >= 0:
                kill_before(self.operation, self.folder)
                object.__setattr__(self, "operation", -1)

        around(ShardWriter, "prepare_local_plan", begin)
