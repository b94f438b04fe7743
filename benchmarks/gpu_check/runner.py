"""Run a stage's steps, each in its own process with a limit, and write what each found at once.

A step that fails or hangs costs no other step its result: every step has a share of the stage's
time that nothing before it can take, and its record is written when it ends.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from fastalign.written_files import write_atomically

STAGE_SECONDS = 540.0
ROOT = Path(__file__).parents[2]
TAIL_CHARACTERS = 4000

Status = Literal["running", "green", "red", "timed out", "skipped", "not started"]
LOST: tuple[Status, ...] = ("red", "timed out", "not started")


def nothing_missing() -> str | None:
    """Return None: a step that needs nothing but torch and Triton."""
    return None


@dataclass(frozen=True)
class Step:
    """One measurement or run of tests.

    Attributes:
        name: name of its files.
        command: program and arguments; `{rows}` stands for the file of its figures, `{folder}`
            for a folder of its own.
        seconds: share of the stage's time that is kept for it.
        most: seconds after which it is stopped, if the steps before leave it more than its share.
        missing: returns what it needs and is not here, or None.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    most: float = STAGE_SECONDS
    missing: Callable[[], str | None] = nothing_missing


@dataclass(frozen=True)
class Record:
    """A step's fate: the content of NAME.json.

    Attributes:
        step: name of the step.
        status: `running` until it ends.
        seconds: seconds that it took.
        allowed_seconds: seconds after which it would have been stopped.
        exit_code: exit code of its process; None if there was none, or it was stopped.
        command: the command.
        reason: why it was skipped or not started.
        rows: file of its figures beside this one, if it wrote any.
        output: end of its output; NAME.txt has all.
    """

    step: str
    status: Status
    seconds: float = 0.0
    allowed_seconds: float = 0.0
    exit_code: int | None = None
    command: str = ""
    reason: str = ""
    rows: str | None = None
    output: str = ""


class Process(Protocol):
    """A running step."""

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None if it still runs after so many seconds."""

    def stop(self) -> None:
        """End it and what it started."""


class ProcessGroup:
    """A step's process, in a group of its own, whose output goes to a file."""

    def __init__(self, command: Sequence[str], output: Path) -> None:
        with output.open("wb") as file:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None if it still runs after so many seconds."""
        try:
            return self._process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Kill the group; a process that hangs in CUDA does not end otherwise."""
        with contextlib.suppress(ProcessLookupError):  # all of it has ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


StartProcess = Callable[[Sequence[str], Path], Process]


@dataclass(frozen=True)
class Stage:
    """A stage's folder and its time; `clock` and `start` are others in tests.

    Attributes:
        folder: folder of the records.
        seconds: time of the stage.
        clock: returns seconds that only rise.
        start: starts a step's process.
    """

    folder: Path
    seconds: float = STAGE_SECONDS
    clock: Callable[[], float] = time.monotonic
    start: StartProcess = ProcessGroup

    def run(self, steps: Sequence[Step]) -> Iterator[Record]:
        """Run the steps in turn; yield the record of each, which is written by then."""
        begin = self.clock()
        steps = self._ordered(steps)
        for number, step in enumerate(steps):
            kept = sum(later.seconds for later in steps[number + 1 :])
            left = self.seconds - (self.clock() - begin)
            # The share is there whatever came before; what others did not use comes on top.
            yield self._record(self._run(step, min(max(left - kept, 0.0), step.most)))

    def _ordered(self, steps: Sequence[Step]) -> list[Step]:
        """Return the steps, those last that an earlier run into this folder did not finish."""
        return sorted(steps, key=lambda step: self._status(step) in (*LOST, "running"))

    def _status(self, step: Step) -> str | None:
        path = self.folder / f"{step.name}.json"
        return str(json.loads(path.read_text("utf-8"))["status"]) if path.exists() else None

    def _run(self, step: Step, allowed: float) -> Record:
        rows, output = (self.folder / f"{step.name}{end}" for end in (".rows.json", ".txt"))
        for stale in (rows, output):
            stale.unlink(missing_ok=True)
        command = [
            part.replace("{rows}", str(rows)).replace("{folder}", str(self.folder / step.name))
            for part in step.command
        ]
        record = Record(step.name, "running", allowed_seconds=allowed, command=" ".join(command))
        reason = step.missing()
        if reason is not None:
            return replace(record, status="skipped", reason=reason)
        if allowed <= 0:
            return replace(record, status="not started", reason="the stage's time was used up")
        self._record(record)
        begin = self.clock()
        process = self.start(command, output)
        try:
            exit_code = process.wait(allowed)
        finally:
            process.stop()
        statuses: dict[int | None, Status] = {None: "timed out", 0: "green"}
        return replace(
            record,
            status=statuses.get(exit_code, "red"),
            seconds=self.clock() - begin,
            exit_code=exit_code,
            rows=rows.name if rows.exists() else None,
            output=_tail(output),
        )

    def _record(self, record: Record) -> Record:
        text = json.dumps(asdict(record), indent=1) + "\n"
        write_atomically(self.folder / f"{record.step}.json", text)
        return record


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    return path.read_text(encoding="utf-8", errors="replace")[-TAIL_CHARACTERS:]


def line_of(record: Record) -> str:
    """Return a line for a table of records."""
    said = record.reason or record.rows or ""
    if record.status in LOST and record.output.strip():
        said = record.output.strip().splitlines()[-1]
    return f"{record.step:28}{record.status:12}{record.seconds:7.0f} s  {said[:120]}"
