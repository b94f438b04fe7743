"""The figures of a measurement: its option `--json`, and the file, rewritten after every figure."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastalign.written_files import write_atomically


class Rows:
    """Figures that are in the file as soon as they are known, so that a hang loses none."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Print a row and write the file."""
        self._rows.append(dict(row))
        print("  ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
        if self._path is not None:
            write_atomically(self._path, json.dumps(self._rows, indent=1) + "\n")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all measurements have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.gpu_check.{name}", description=description
    )
    parser.add_argument("--json", type=Path, help="file of the figures, which is replaced")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    return parser
