"""A run's output: `metrics.jsonl`, `samples.jsonl`, and a progress bar or plain lines."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fastalign.choices import TrackerName
from fastalign.fused import metric_means
from fastalign.output import shown
from fastalign.progress import bars
from fastalign.report.trackers import TrackedRun, Trackers

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"  # in a run's folder
Metrics = dict[str, float | int]
NUM_PLAIN_LINES = 20


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


@dataclass(frozen=True)
class KeptLines:
    """The part of a file of lines that a checkpoint knows.

    Attributes:
        num_bytes: length of the file.
        unwritten: lines behind it that could not be written.
    """

    num_bytes: int = 0
    unwritten: str = ""

    def as_counters(self, file: str) -> dict[str, Any]:
        """Return entries of a checkpoint's `state.json`, such as `metrics_bytes`."""
        name = file.partition(".")[0]
        held = {f"{name}_unwritten": self.unwritten} if self.unwritten else {}
        return {f"{name}_bytes": self.num_bytes, **held}

    @classmethod
    def of_counters(cls, file: str, saved: Mapping[str, Any]) -> "KeptLines | None":
        """Return what `as_counters` gave; None: the checkpoint does not know the file."""
        name = file.partition(".")[0]
        if f"{name}_bytes" not in saved:
            return None
        return cls(saved[f"{name}_bytes"], saved.get(f"{name}_unwritten", ""))


class LinesFile:
    """A file that lines are appended to; lines that cannot be written are held.

    It is cut to what a checkpoint, of this `step`, knows of it; None: there must be no such file.

    Raises:
        ValueError: if the file is shorter than the checkpoint knows it, or there should be none.
    """

    def __init__(self, path: Path, kept: KeptLines | None, step: int) -> None:
        found = path.stat().st_size if path.exists() else 0
        if kept is None and found:
            raise ValueError(
                f"{path}: expected no such file, for the run has written none up to step {step}; "
                "move it away"
            )
        kept = kept or KeptLines()
        if found < kept.num_bytes:
            raise ValueError(
                f"{path}: expected at least the {kept.num_bytes} bytes that the checkpoint of step "
                f"{step} knows, got {found}; --run.start-afresh metrics goes on with what there is"
            )
        self._file = path.open("ab", buffering=0)
        self._file.truncate(kept.num_bytes)
        self._size, self._unwritten = kept.num_bytes, kept.unwritten.encode()

    def hold(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, as JSON objects, to what is to be written."""
        for row in rows:
            text = json.dumps(row, ensure_ascii=False)
            # Half of a surrogate pair has no UTF-8; its escape is JSON.
            self._unwritten += text.encode("utf-8", "backslashreplace") + b"\n"

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

    @property
    def holds(self) -> bool:
        """True if lines wait to be written."""
        return bool(self._unwritten)

    def kept(self) -> KeptLines:
        """Return what a checkpoint is to hold of the file, once `sync` has returned."""
        return KeptLines(self._size, self._unwritten.decode())

    def sync(self) -> None:
        """Flush the file to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class MetricsWriter:
    """Appends an object a step to `metrics.jsonl`, its samples to `samples.jsonl`; feeds trackers.

    Lines that cannot be written, since the disk is full or the like, are reported, held, and
    written before the next one; a checkpoint holds them too.

    Args:
        run: the run, at the step of its checkpoint.
        kept: what the checkpoint knows of each file, by its name; the file is cut to that.
        trackers: trackers that get the numbers too.
        samples: whether the run writes samples.

    Raises:
        ValueError: if a file is not as the checkpoint knows it.
    """

    def __init__(
        self,
        run: TrackedRun,
        kept: Mapping[str, KeptLines],
        trackers: Sequence[TrackerName] = (),
        *,
        samples: bool = False,
    ) -> None:
        self._files: dict[str, LinesFile] = {}
        with ExitStack() as stack:
            for name in [METRICS, *([SAMPLES] if samples or SAMPLES in kept else [])]:
                self._files[name] = LinesFile(run.folder / name, kept.get(name), run.step)
                stack.callback(self._files[name].close)
            self.require_written()
            stack.pop_all()
        self._trackers = Trackers(trackers, run)

    def write(self, metrics: Metrics, samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Append a step; a number that JSON cannot hold (NaN, Inf) becomes a string."""
        plain = {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}
        failed_before = any(file.holds for file in self._files.values())
        self._files[METRICS].hold([plain])
        if samples:
            self._files[SAMPLES].hold(samples)
        try:
            self.require_written()
        except OSError as error:
            if not failed_before:
                print(f"{error}; the lines are held, and tried again after each step")
        step = int(metrics["step"])
        self._trackers.log({k: v for k, v in metrics.items() if k != "step"}, step)

    def require_written(self) -> None:
        """Append the lines that are held, or raise OSError; the files then hold whole lines."""
        for file in self._files.values():
            file.require_written()

    def kept(self) -> dict[str, KeptLines]:
        """Return what a checkpoint is to hold of each file, once `sync` has returned."""
        return {name: file.kept() for name, file in self._files.items()}

    def sync(self) -> None:
        """Flush the files to the disk."""
        for file in self._files.values():
            file.sync()

    def close(self, *, finished: bool = False) -> None:
        """Close the files and the trackers, of a run that took all its steps if it `finished`."""
        for file in self._files.values():
            file.close()
        self._trackers.close(finished=finished)


class ProgressDisplay:
    """A bar on a terminal or in a notebook, about twenty plain lines elsewhere.

    They show the loss, tokens a second and the time left.

    The run begins after `step`, of `num_steps`.
    """

    def __init__(self, title: str, num_steps: int, step: int) -> None:
        self._title, self._num_steps, self._first = title, num_steps, step
        self._start = time.monotonic()
        self._stack = ExitStack()

    def __enter__(self) -> "ProgressDisplay":
        """Show the bar."""
        self._bars = self._stack.enter_context(bars(keep=True))
        if self._bars is not None:
            self._task = self._bars.add_task(
                self._title, total=self._num_steps, completed=self._first, numbers="", delay=0
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the bar."""
        self._stack.close()

    def say(self, line: str) -> None:
        """Print a line beside the bar."""
        if self._bars is not None:
            self._bars.console.print(shown(line), markup=False, highlight=False)
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
        if self._bars is not None:
            self._bars.update(self._task, completed=step, numbers=numbers)
            return
        every = max(1, self._num_steps // NUM_PLAIN_LINES)
        if step % every == 0 or step == self._num_steps or step == self._first + 1:
            elapsed = time.monotonic() - self._start
            left = elapsed / (step - self._first) * (self._num_steps - step)
            print(
                f"{self._title} {step}/{self._num_steps}  {numbers}  {left:.0f} s left",
            )
