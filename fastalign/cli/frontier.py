"""`fastalign frontier RUN...`: reward against KL of many runs, as a picture and a table."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastalign.cli.config_parse import parse_flags
from fastalign.cli.tables import show


@dataclass(frozen=True)
class FrontierConfig:
    """Averages runs over their seeds; writes OUT and, beside it, OUT.table.json."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs or eval.json files in them (labelled by config.yaml), or lists (.yaml, .json,
    .jsonl) of `method`, `strength`, `seed`, `run` (its folder or eval.json), `best_of`."""
    out: str = "frontier.html"
    """Page (.html) or picture (.png, .svg, .pdf) to write; an older one is replaced."""
    origin: str = "sft"
    """Method whose point all curves start at, if it is there."""


def main(argv: Sequence[str]) -> int:
    """Exit code 0: page or picture and table are written."""
    from fastalign.report.frontier import frontier_points, read_frontier
    from fastalign.report.frontier_page import (
        COLUMNS,
        PICTURES,
        find_origin,
        frontier_table,
        write_frontier,
    )

    config = parse_flags(FrontierConfig, argv, "fastalign frontier")
    if not config.runs:
        raise ValueError("expected runs, eval.json files or lists of them, got none")
    out = Path(config.out)
    if out.suffix not in (".html", *PICTURES):
        raise ValueError(f"out: expected .html, {', '.join(PICTURES)}, got {out}")
    points = frontier_points(read_frontier(config.runs))
    show(COLUMNS, frontier_table(points), num_left=2)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_frontier(points, find_origin(points, config.origin), out)
    table = out.with_suffix(".table.json")
    table.write_text(
        json.dumps([asdict(point) for point in points], indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    print(f"written to {out} and {table}")
    return 0
