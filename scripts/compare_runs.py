"""Compare the results of two calls of `compare_commits.sh run`: numbers, texts, tables and weights.

    python scripts/compare_runs.py OLD NEW

Print one line per run: `identical`, or the first difference with the largest relative one. Wall
times, speeds and memory are not compared. Exit code 0: identical; 1: something differs.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

# Pages have tables, the .json and .jsonl files of a run everything else that it measured.
SUFFIXES = {".jsonl", ".json", ".safetensors", ".html"}
NOT_RESULTS = {
    "source",
    "checkpoints",
    "cache",
    "tensorboard",
    "machine.json",
    "fastalign_manifest.json",
}
MEASURED = re.compile(
    r"second|s/step|tokens_per_|tokens/s|peak|flops|utilisation|^(.*/)?eps$", re.IGNORECASE
)
TIME_TABLE = "seconds an iteration"  # all columns are shares of wall time


class Tables(HTMLParser):
    """Reads the cells of a page's tables.

    Attributes:
        tables: rows of cells, header first, of each table.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """Open a table, a row or a cell."""
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        """Close a cell."""
        self._in_cell = self._in_cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        """Add text to the open cell."""
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of every leaf of nested objects and lists; skip measured times."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if MEASURED.search(key) is None:
                yield from leaves(inner, f"{name} {key}".lstrip())
    elif isinstance(value, list):
        if name.endswith("target_modules"):  # a set to peft, written in any order
            value = sorted(value)
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{name}[{index}]")
    else:
        yield name, value


def tensor_hashes(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each tensor's name, and its dtype, shape and SHA-256."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            yield name, f"{tensor.dtype} {[*tensor.shape]} {hashlib.sha256(data).hexdigest()[:12]}"


def table_cells(text: str) -> Iterator[tuple[str, str]]:
    """Yield the cells of a page's tables by table, row and column."""
    parser = Tables()
    parser.feed(text)
    for number, (header, *rows) in enumerate(filter(None, parser.tables), 1):
        if TIME_TABLE in header:
            continue
        for index, row in enumerate(rows, 1):
            for column, cell in zip(header, row, strict=True):
                if MEASURED.search(column) is None:
                    yield f"table {number}, row {index}, {column or 'first column'}", cell.strip()


def read_values(path: Path, root: Path) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of everything in a file that has to be the same in both folders."""
    if path.suffix == ".safetensors":
        yield from tensor_hashes(path)
        return
    text = path.read_text(encoding="utf-8").replace(str(root), "FOLDER")
    if path.suffix == ".html":
        yield from table_cells(text)
    elif path.suffix == ".json":
        value = json.loads(text)
        if path.parent.name == "eval":
            value.pop("config", None)  # settings, whose names may change
        yield from leaves(value, "")
    else:
        for number, line in enumerate(text.splitlines(), 1):
            row = json.loads(line)
            step = f", step {row['step']}" if isinstance(row, dict) and "step" in row else ""
            yield from leaves(row, f"line {number}{step}:")


def relative_difference(old: Any, new: Any) -> float:
    """Return |old - new| / max(|old|, |new|); infinity unless both are numbers."""
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in (old, new)):
        return float("inf")
    return abs(old - new) / (max(abs(old), abs(new)) or 1.0)


def compare_files(old_root: Path, new_root: Path, name: str) -> tuple[int, list[str], float]:
    """Return the number of values, the differing ones, and the largest relative difference."""
    if not all((root / name).is_file() for root in (old_root, new_root)):
        side = "first" if (new_root / name).is_file() else "second"
        return 1, [f"{name}: not in the {side} folder"], float("inf")
    old, new = (dict(read_values(root / name, root)) for root in (old_root, new_root))
    names = [*old, *(key for key in new if key not in old)]
    differing = [key for key in names if key not in old or key not in new or old[key] != new[key]]
    lines = [
        f"{name}, {k} {old.get(k, 'absent')!r}, now {new.get(k, 'absent')!r}" for k in differing
    ]
    largest = max((relative_difference(old.get(k), new.get(k)) for k in differing), default=0.0)
    return len(names), lines, largest


def result_files(root: Path) -> set[str]:
    """Return the files with results, relative to the root."""
    found = (p.relative_to(root) for p in root.rglob("*") if p.suffix in SUFFIXES)
    return {p.as_posix() for p in found if not NOT_RESULTS.intersection(p.parts)}


def run_of(root: Path, name: str) -> str:
    """Return the run that a file belongs to: the nearest folder above it with metrics.jsonl."""
    parents = (root / name).relative_to(root).parents
    with_metrics = (p for p in parents if (root / p / "metrics.jsonl").is_file())
    return next(with_metrics, Path(name).parent).as_posix()


def main() -> int:
    """Return exit code 0 if everything is identical, 1 if something differs."""
    parser = argparse.ArgumentParser(description="Compare the results of two commits, run by run.")
    parser.add_argument("old", type=Path, help="folder of `compare_commits.sh run`")
    parser.add_argument("new", type=Path, help="folder of another")
    parser.add_argument("--all", action="store_true", help="print every value that differs")
    options = parser.parse_args()
    old, new = options.old.resolve(), options.new.resolve()
    first, second = result_files(old), result_files(new)
    tops = [{Path(name).parts[0] for name in names} for names in (first, second)]
    missing = tops[0] ^ tops[1]
    for top in sorted(missing):
        print(f"{top}: not in the {'second' if top in tops[0] else 'first'} folder")
    runs: dict[str, list[str]] = {}
    both = [name for name in first | second if Path(name).parts[0] not in missing]
    for name in sorted(both, key=lambda name: ("metrics" not in name, name)):
        runs.setdefault(run_of(old if (old / name).is_file() else new, name), []).append(name)
    failed = bool(missing) or not runs
    for run, names in sorted(runs.items()):
        found = [compare_files(old, new, name) for name in names]
        count = sum(number for number, _, _ in found)
        lines = [line for _, differing, _ in found for line in differing]
        failed = failed or bool(lines)
        if lines:
            largest = f"largest relative difference {max(each[2] for each in found):.1e}"
            print(f"{run}: {len(lines)} of {count} values differ, {largest}; first: {lines[0]}")
        else:
            print(f"{run}: identical ({count} values in {len(names)} files)")
        for line in lines[1:] if options.all else ():
            print(f"    {line}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
