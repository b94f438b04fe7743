"""A run's output: `metrics.jsonl`, TensorBoard, and a progress bar or plain lines."""

import errno
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastalign.fused import metric_means
from fastalign.notebook import NotebookProgress, in_notebook
from fastalign.output import safe_output, shown

METRICS = "metrics.jsonl"  # in a run's folder
Metrics = dict[str, float | int]
NUM_PLAIN_LINES = 20
BOARD_BYTES = 2**18  # that must be free for TensorBoard's writer to go on


def mean_metrics(sums: dict[str, float]) -> Metrics:
    """Return a step's summed metrics as means, by `fused.metric_means`."""
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
    return {name: value.item() for name, value in metric_means(tensors).items()}


def plain_numbers(metrics: Metrics) -> Metrics:
    """Return metrics with NumPy's numbers, tensors () and the like as Python's.

    Raises:
        ValueError: if one is no number.
    """
    plain: Metrics = {}
    for name, value in metrics.items():
        single = hasattr(value, "__float__") and not getattr(value, "shape", ())
        if not single or isinstance(value, str):
            raise ValueError(f"metric {name}: expected a number, got {value!r}")
        if isinstance(value, torch.Tensor):
            value = value.item()
        plain[name] = value if isinstance(value, int | float) else float(value)
    return plain


def all_skipped(metrics: Metrics) -> bool:
    """Return whether a step had updates and none of them was applied."""
    return metrics["skipped"] == metrics.get("num_updates", 1) > 0


def skipped_line(metrics: Metrics) -> str:
    """Return the line printed for a step of which not every update was applied."""
    skipped, several = metrics["skipped"], metrics.get("num_updates", 1)
    of_all = "" if all_skipped(metrics) else f": {skipped} of {several} updates"
    return (
        f"step {metrics['step']}{of_all} skipped: loss {metrics['loss']}, gradient norm "
        f"{metrics['grad_norm']}; no weight was changed by it"
    )


class MetricsWriter:
    """Appends one JSON object a step, and the same numbers to TensorBoard.

    Lines that cannot be written, since the disk is full or the like, are reported, held, and
    written before the next one; a checkpoint holds them too. An existing `metrics.jsonl` is cut to
    what a checkpoint knows of it, and TensorBoard's values after that checkpoint's `step` are
    dropped.
    """

    def __init__(self, folder: Path, kept: "KeptMetrics", step: int) -> None:
        path = folder / METRICS
        found = path.stat().st_size if path.exists() else 0
        if found < kept.num_bytes:
            raise ValueError(
                f"{path}: expected at least the {kept.num_bytes} bytes that the checkpoint of step "
                f"{step} knows, got {found}; --run.start-afresh metrics goes on with what there is"
            )
        self._file = path.open("ab", buffering=0)
        self._file.truncate(kept.num_bytes)
        self._size, self._unwritten = kept.num_bytes, kept.unwritten.encode()
        self._folder = folder
        self.require_written()
        self._board: Any = None
        self._on_board(partial(self._open_board, step), opens=True)

    def _open_board(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1)

    def write(self, metrics: Metrics) -> None:
        """Append one object; a number that JSON cannot hold (NaN, Inf) becomes a string."""
        plain = {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}
        failed_before = bool(self._unwritten)
        self._unwritten += json.dumps(plain).encode() + b"\n"
        try:
            self.require_written()
        except OSError as error:
            if not failed_before:
                print(f"{error}; the lines are held, and tried again after each step")
        self._on_board(partial(self._add_scalars, metrics))

    def require_written(self) -> None:
        """Append the lines that are held, or raise OSError; the file then holds whole lines."""
        try:
            rest = self._unwritten
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(self._size)
            raise OSError(f"{self._file.name}: {error.strerror}") from error
        self._size += len(self._unwritten)
        self._unwritten = b""

    def kept(self) -> "KeptMetrics":
        """Return what a checkpoint is to hold of the file, once `sync` has returned."""
        return KeptMetrics(self._size, self._unwritten.decode())

    def sync(self) -> None:
        """Flush `metrics.jsonl` to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._on_board(lambda: self._board.close())

    def _add_scalars(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(name, value, metrics["step"])

    def _on_board(self, work: Callable[[], None], *, opens: bool = False) -> None:
        """Report a failure of TensorBoard once: it ends no run, and hides no other failure."""
        if self._board is None and not opens:
            return
        try:
            if shutil.disk_usage(self._folder).free < BOARD_BYTES:  # it would print a traceback
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            work()
        except OSError as error:
            print(f"TensorBoard's files are not complete: {error.strerror}")
            self._board = None


@dataclass(frozen=True)
class KeptMetrics:
    """The part of `metrics.jsonl` that a checkpoint knows.

    Attributes:
        num_bytes: length of the file.
        unwritten: lines behind it that could not be written.
    """

    num_bytes: int = 0
    unwritten: str = ""


class ProgressDisplay:
    """A bar on a terminal or in a notebook, about twenty plain lines elsewhere.

    They show the loss, tokens a second and the time left.

    The run begins after `step`, of `num_steps`.
    """

    def __init__(self, title: str, num_steps: int, step: int) -> None:
        self._title, self._num_steps, self._first = title, num_steps, step
        self._start = time.monotonic()
        self._bar: Progress | None = None
        self._safe = ExitStack()
        if sys.stdout.isatty() or in_notebook():
            self._bar = (NotebookProgress if in_notebook() else Progress)(
                TextColumn(title),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task(title, total=num_steps, completed=step, numbers="")

    def __enter__(self) -> "ProgressDisplay":
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()  # which passes on what is printed, with escapes of its own
            self._safe.enter_context(safe_output())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._safe.close()
            self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line beside the bar."""
        if self._bar is not None:
            self._bar.console.print(shown(line), markup=False, highlight=False)
        else:
            print(line)

    def update(self, metrics: Metrics) -> None:
        """Show one step's metrics."""
        step = int(metrics["step"])
        numbers = f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:.0f} tokens/s"
        for name in ("rewards/accuracies", "accuracy"):
            if name in metrics:
                numbers += f"  accuracy {metrics[name]:.2f}"
        for name, short in (("reward", "reward"), ("objective/kl", "KL")):
            if name in metrics:
                numbers += f"  {short} {metrics[name]:.3f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        every = max(1, self._num_steps // NUM_PLAIN_LINES)
        if step % every == 0 or step == self._num_steps or step == self._first + 1:
            elapsed = time.monotonic() - self._start
            left = elapsed / (step - self._first) * (self._num_steps - step)
            print(
                f"{self._title} {step}/{self._num_steps}  {numbers}  {left:.0f} s left",
            )
