"""Tables on a terminal or in a log."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int = 1) -> None:
    """Prints a table: `num_left` columns of words, then numbers, which stand right.

    Where there is no terminal to fit, it is not cut.
    """
    shown = Table()
    for number, column in enumerate(columns):
        shown.add_column(column, justify="left" if number < num_left else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    Console(markup=False, width=None if sys.stdout.isatty() else 140).print(shown)
