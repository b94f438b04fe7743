"""`fastalign report RUN...`: a table, and one self-contained page with pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastalign.cli.config_parse import parse_flags
from fastalign.cli.tables import show


@dataclass(frozen=True)
class ReportConfig:
    """Reads each run's settings, metrics, evaluation and samples, and the size of its model."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs (--run.dir)."""
    out: str = "report.html"
    """Page to write; an older one is replaced."""


def main(argv: Sequence[str]) -> int:
    """Exit code 0: the page is written."""
    from fastalign.report.page import COLUMNS, render, table
    from fastalign.report.reward import REWARD_COLUMNS, reward_table
    from fastalign.report.runs import read_runs
    from fastalign.report.speed import SPEED_COLUMNS, TIME_COLUMNS, speed_table, time_table

    config = parse_flags(ReportConfig, argv, "fastalign report")
    if not config.runs:
        raise ValueError("expected one run's folder or more, got none")
    runs = read_runs(config.runs)
    show(COLUMNS, table(runs), num_left=2)
    rewards = reward_table(runs)
    if rewards:
        show(REWARD_COLUMNS, rewards)
    for columns, rows in ((SPEED_COLUMNS, speed_table(runs)), (TIME_COLUMNS, time_table(runs))):
        if rows:
            show(columns, rows)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(runs), encoding="utf-8")
    print(f"report written to {out}")
    return 0
