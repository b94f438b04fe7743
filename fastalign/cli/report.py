"""`fastalign report` and `fastalign frontier`: tables on the terminal, and pages with pictures."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from fastalign.output import shown
from fastalign.written_files import check_file, input_paths, write_file

RUN_ARGUMENT = tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")


@dataclass(frozen=True)
class ReportConfig:
    """Write a page on runs and on people's comparisons.

    Of runs: settings, metrics, evaluation, samples, size of the model; of comparisons: agreement,
    biases, learning curve, win rates.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, RUN_ARGUMENT]
    """Run folders (--run.dir), and databases of `fastalign compare` (.db)."""
    out: str = "report.html"
    """Page (.html) to write."""
    overwrite: bool = False
    """Replace the page if it exists."""
    watch: bool = False
    """Serve the page to this machine until Ctrl-C, with newer numbers as they come, and write none;
    needs fastalign[compare]."""
    port: int = 7861
    """Port of --watch; 0: any that is free."""


@dataclass(frozen=True)
class FrontierConfig:
    """Average runs over their seeds; write a picture to OUT and the points to OUT.table.json."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, RUN_ARGUMENT]
    """Run folders or eval.json files in them (labelled by config.yaml), or lists (.yaml, .json,
    .jsonl) of entries with `method`, `strength`, `seed`, `run` (its folder or eval.json) and
    `best_of`."""
    out: str = "frontier.html"
    """Page (.html) or picture (.png, .svg, .pdf) to write."""
    origin: str = "sft"
    """Method whose point all curves start at, if it is among the runs."""
    overwrite: bool = False
    """Replace the files if they exist."""


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int = 1) -> None:
    """Print a table with `num_left` columns of words on the left and numbers right-aligned.

    Without a terminal, whose width limits it, the table has up to 140 columns.
    """
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < num_left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(shown, row))
    Console(markup=False, width=None if sys.stdout.isatty() else 140).print(table)


def main(config: ReportConfig) -> int:
    """Run `fastalign report`; return 0 when the page is written."""
    from fastalign.report.comparisons import is_comparisons, read_comparisons
    from fastalign.report.page import render, tables
    from fastalign.report.runs import read_runs

    if not config.runs:
        raise ValueError("expected one run's folder or more, got none")
    if config.watch:
        return watch(config)
    if Path(config.out).suffix != ".html":
        raise ValueError(f"out: expected .html, got {config.out}")
    out = check_file("out", config.out, overwrite=config.overwrite, inputs=input_paths(config))
    runs = read_runs([path for path in config.runs if not is_comparisons(path)])
    comparisons = read_comparisons([path for path in config.runs if is_comparisons(path)])
    for name, (columns, rows) in tables(runs).items():
        if rows:
            show(columns, rows, num_left=2 if name == "runs" else 1)
    for each in comparisons:
        show((each.name, ""), each.summary, num_left=2)
        print("".join(f"{line}\n" for line in each.win_rates), end="")
    write_file(out, render(runs, comparisons), overwrite=config.overwrite)
    print(f"report written to {out}")
    return 0


def watch(config: ReportConfig) -> int:
    """Serve the report until it is interrupted; return 0."""
    from fastalign.cli.compare import serve
    from fastalign.cli.compare.settings import CompareConfig, CompareServer
    from fastalign.report.comparisons import is_comparisons, read_comparisons
    from fastalign.report.page import render
    from fastalign.report.runs import read_runs

    for path in config.runs:
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such folder or database")

    def read(version: str) -> str:
        runs = read_runs([path for path in config.runs if not is_comparisons(path)])
        people = read_comparisons([path for path in config.runs if is_comparisons(path)])
        return render(runs, people, watch=version)

    server = CompareConfig(server=CompareServer(port=config.port))
    with serve.opened_socket(server) as listening:
        from fastalign.report.watch import watched

        site = watched(config.runs, read)
        serve.serve(server, site, listening, serve.host_names(server), "Ctrl-C ends it")
    return 0


def frontier(config: FrontierConfig) -> int:
    """Run `fastalign frontier`; return 0 when the picture and the table are written."""
    from fastalign.report.frontier import (
        COLUMNS,
        PICTURES,
        check_picture,
        find_origin,
        frontier_points,
        frontier_table,
        read_frontier,
        render_frontier,
    )

    if not config.runs:
        raise ValueError("expected runs, eval.json files or lists of them, got none")
    out = Path(config.out)
    if out.suffix not in (".html", *PICTURES):
        raise ValueError(f"out: expected .html, {', '.join(PICTURES)}, got {out}")
    check_picture(out.suffix)
    table = out.with_suffix(".table.json")
    for path in (out, table):
        check_file("out", path, overwrite=config.overwrite, inputs=input_paths(config))
    points = frontier_points(read_frontier(config.runs))
    show(COLUMNS, frontier_table(points), num_left=2)
    content = render_frontier(points, find_origin(points, config.origin), out.suffix)
    write_file(out, content, overwrite=config.overwrite)
    text = json.dumps([asdict(point) for point in points], indent=1, ensure_ascii=False)
    write_file(table, text + "\n", overwrite=config.overwrite)
    print(f"written to {out} and {table}")
    return 0
