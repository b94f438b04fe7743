"""Progress of long work: bars on a terminal or in a notebook, else a line now and then.

Work that may last minutes is a `phase`. The code that does it advances the innermost phase that is
open, and need not know which one that is:

    with phase("reference log-probs", len(responses), "responses"):
        for batch in batches:
            ...
            advance(len(batch))

A phase belongs to the thread that opened it: `advance` in another thread does nothing.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from fastalign.output import safe_output

DELAY_SECONDS = 0.5  # a phase that is over sooner shows no bar
LINE_SECONDS = 30.0  # least time between two lines of progress in a log
SHARE_OF_TIME = 50  # a log that has grown for hours gets a line in a fiftieth of that time
SECONDS_ARE_CLEAR = 120  # longer times are said in minutes or hours
NOTEBOOK_WIDTH = 100  # characters of a line in a notebook
NOTEBOOK_SECONDS = 0.2  # least time between two updates of a notebook's output


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")


class Bars(Progress):
    """Bars of a terminal; one whose field `delay` is longer than it has lasted is not shown."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the table of the bars that are shown."""
        tasks = [task for task in self.tasks if (task.elapsed or 0) >= task.fields["delay"]]
        yield self.make_tasks_table(tasks)


class NotebookBars(Bars):
    """The same, shown as the text of one output of a notebook's cell.

    Args:
        columns: columns of each bar.
    """

    def __init__(self, *columns: ProgressColumn) -> None:
        self._output: Any = None  # once it has started
        self._updated = 0.0
        console = Console(
            force_jupyter=False, force_terminal=False, color_system=None, width=NOTEBOOK_WIDTH
        )
        super().__init__(*columns, console=console, auto_refresh=False)

    def start(self) -> None:
        """Show the bars."""
        from IPython.display import display

        self._output = display(self._content(), raw=True, display_id=True)

    def stop(self) -> None:
        """Show the last state, which stays."""
        self._show()

    def refresh(self) -> None:
        """Show the present state, if it is time to."""
        if time.monotonic() >= self._updated + NOTEBOOK_SECONDS:
            self._show()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Update a bar, and show it if it is time to; the arguments are those of rich."""
        super().update(task_id, **changes)
        self.refresh()

    def _show(self) -> None:
        if self._output is not None:
            self._output.update(self._content(), raw=True)
            self._updated = time.monotonic()

    def _content(self) -> dict[str, str]:
        with self.console.capture() as text:
            self.console.print(self.get_renderable())
        return {"text/plain": text.get().rstrip()}


_shown: Bars | None = None  # of this process: rich shows one set of bars at a time


def can_show() -> bool:
    """Return whether bars can be shown: on a terminal, or in a notebook."""
    return sys.stdout.isatty() or in_notebook()


@contextmanager
def bars(*, keep: bool = False) -> Iterator[Bars | None]:
    """Show bars on a terminal or in a notebook, and yield them; those that are shown already serve.

    Yields None where there is neither. With `keep` the last state of the bars stays on a terminal.
    """
    global _shown
    if _shown is not None or not can_show():
        yield _shown
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),  # the rest fits beside it into 80 columns
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    # A console of its own: rich's may have been made when there was no terminal.
    found = (
        NotebookBars(*columns)
        if in_notebook()
        else Bars(*columns, console=Console(), transient=not keep)
    )
    found.start()  # which passes on what is printed, with escapes of its own
    _shown = found
    try:
        with safe_output():
            yield found
    finally:
        _shown = None
        found.stop()


class _Clock:
    """When this process began its first phase and printed its latest line of progress."""

    start: float | None = None
    said = 0.0

    def is_due(self, now: float) -> bool:
        """Return whether a line is due, and count it as printed."""
        start = self.start or now
        due = now - self.said >= max(LINE_SECONDS, (now - start) / SHARE_OF_TIME)
        self.said = now if due else self.said
        return due


_clock = _Clock()


class Phase:
    """Work of which so much is done; `phase` opens one.

    Args:
        name: the work, in words.
        total: amount of it; None: not known.
        unit: unit of the amount, in the plural.

    Attributes:
        done: amount that is done.
    """

    def __init__(self, name: str, total: float | None, unit: str) -> None:
        self._name, self._total, self._unit = name, total, unit
        self.done = 0.0
        self._start = time.monotonic()
        if _clock.start is None:
            _clock.start = self._start
        # The first line of a phase comes when the phase itself has lasted a while.
        self._first_line = self._start + LINE_SECONDS
        self._stack = ExitStack()
        self._bars: Bars | None = None
        if _shown is not None:
            self._add_bar()

    def _add_bar(self) -> None:
        self._bars = self._stack.enter_context(bars())
        if self._bars is None:
            return
        delay = DELAY_SECONDS - (time.monotonic() - self._start)
        task = self._bars.add_task(self._name, total=self._total, numbers="", delay=delay)
        self._stack.callback(self._bars.remove_task, task)
        self._task = task

    def advance(self, count: float) -> None:
        """Add to what is done, and show it."""
        self.done += count
        if self._total is not None:
            self.done = min(self.done, self._total)
        now = time.monotonic()
        # Bars are not started for what is over at once, nor before a phase has forked processes.
        if self._bars is None and now - self._start >= DELAY_SECONDS and can_show():
            self._add_bar()
        if self._bars is not None:
            self._bars.update(self._task, completed=self.done, numbers=self._rate(now))
        elif now >= self._first_line and _clock.is_due(now):
            print(self._line(now))

    def _rate(self, now: float) -> str:
        seconds = now - self._start
        if not self.done or not seconds:
            return ""
        rate = self.done / seconds
        return f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s"

    def _line(self, now: float) -> str:
        """Return the line of a log.

        Such as `evaluation: 512 of 2,048 examples, 24 examples/s, 64 s left`.
        """
        if self._total is None:
            return f"{self._name}: {self.done:,.0f} {self._unit}, {self._rate(now)}"
        line = f"{self._name}: {self.done:,.0f} of {self._total:,.0f} {self._unit}"
        if not self.done:
            return line
        left = (now - self._start) / self.done * (self._total - self.done)
        return f"{line}, {self._rate(now)}, {duration(left)} left"

    def close(self) -> None:
        """Remove the bar."""
        self._stack.close()


_current: ContextVar[Phase | None] = ContextVar("phase", default=None)


@contextmanager
def phase(name: str, total: float | None, unit: str) -> Iterator[Phase]:
    """Open a phase of work, which is shown while it lasts; see `Phase` for the arguments."""
    found, around = Phase(name, total, unit), _current.get()
    _current.set(found)
    try:
        yield found
    finally:
        _current.set(around)  # no token of `set`: a notebook may close a phase in another context
        found.close()


def advance(count: float = 1.0) -> None:
    """Advance the innermost phase that this thread has opened, if there is one."""
    found = _current.get()
    if found is not None:
        found.advance(count)


def restart() -> None:
    """Begin the innermost phase again from 0, as when all its work is repeated."""
    found = _current.get()
    if found is not None:
        found.advance(-found.done)


def duration(seconds: float) -> str:
    """Return a time in words: `48 s`, `12 min`, `3 h 05 min`."""
    if seconds < SECONDS_ARE_CLEAR:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
