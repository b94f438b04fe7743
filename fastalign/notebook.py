"""Progress in a notebook: one output of text that is updated, for which no widget is needed."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TaskID

WIDTH = 100  # characters of a line
LEAST_SECONDS = 0.2  # between two updates


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")


class NotebookProgress(Progress):
    """Bars as rich's `Progress` has them, shown as the text of one output of a cell.

    Args:
        columns: columns of each bar.
    """

    def __init__(self, *columns: ProgressColumn) -> None:
        self._output: Any = None  # once it has started
        self._updated = 0.0
        console = Console(force_jupyter=False, force_terminal=False, color_system=None, width=WIDTH)
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
        if time.monotonic() >= self._updated + LEAST_SECONDS:
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
