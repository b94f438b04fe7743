"""`python -m benchmarks.readme` rewrites the README's tables from the rows in `benchmarks/results`.

The text between two marks is the output of `tables`. Each figure is of both settings of the
allocator, `default / keep`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ALLOCATORS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "Intel-Xeon-2-threads"
BEGIN, END = "<!-- python -m benchmarks.readme -->", "<!-- end -->"
OURS = "fastalign"
NAMES = {
    "trl": "TRL",
    "liger": "Liger",
    "torch lce": "torch's `linear_cross_entropy`",
    "torch.compile": "`torch.compile`",
    "trl, reference precomputed": "TRL, reference precomputed",
}

Rows = Sequence[dict[str, Any]]


def read_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of a comparison."""
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def both(rows: Rows, show: Callable[[dict[str, Any]], str], **wanted: object) -> str:
    """Return `default / keep` of the rows with these values; empty without such rows."""
    cells = []
    for allocator in ALLOCATORS:
        of_allocator = [
            row
            for row in rows
            if row["allocator"] == allocator and all(row[k] == v for k, v in wanted.items())
        ]
        cells += [show(row) for row in of_allocator]
    return " / ".join(cells)


def names_of(rows: Rows) -> list[str]:
    """Return the implementations, ours first."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    return sorted(names, key=lambda name: not name.startswith(OURS))


def share(row: dict[str, Any]) -> str:
    """Return the share of the products' speed."""
    return f"{row['fraction_of_products']:.0%}".replace("%", " %")


def seconds(row: dict[str, Any]) -> str:
    """Return the time in seconds."""
    return f"{row['milliseconds'] / 1e3:.1f}"


def mebibytes(row: dict[str, Any]) -> str:
    """Return the peak memory."""
    return f"{row['peak_bytes'] / 2**20:,.0f}"


def head_table(rows: Rows) -> Iterator[str]:
    """Yield a table of one head: share of the products, and memory.

    Memory is that of the first setting: an allocator that keeps memory has a call's already.
    """
    rows = [row for row in rows if row["pass"] == "forward+backward"]
    rows = [row for row in rows if row["case"] == rows[0]["case"]]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    yield f"| {rows[0]['case']} |" + "".join(f" {dtype} | MiB |" for dtype in dtypes)
    yield "|---" * (1 + 2 * len(dtypes)) + "|"
    for name in names_of(rows):
        cells = []
        for dtype in dtypes:
            wanted = {"dtype": dtype, "implementation": name}
            cells.append(both(rows, share, **wanted))
            cells.append(both(rows, mebibytes, **wanted).partition(" / ")[0])
        yield f"| {NAMES.get(name, name)} | {' | '.join(cells)} |"


def steps_table(rows: Rows) -> Iterator[str]:
    """Yield a table of steps: by case seconds, share of the products, and memory."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    yield f"| {rows[0]['pass']} |" + "".join(f" {c}, s | of products | MiB |" for c in cases)
    yield "|---" * (1 + 3 * len(cases)) + "|"
    for name in names_of(rows):
        cells = [
            both(rows, show, case=case, implementation=name)
            for case in cases
            for show in (seconds, share, mebibytes)
        ]
        yield f"| {NAMES.get(name, name)} | {' | '.join(cells)} |"


def tables() -> str:
    """Return all tables of the README, each under its caption."""
    found = [CAPTION]
    for name, (make, caption) in TABLES.items():
        found += [caption, "\n".join(make(read_rows(name)))]
    return "\n\n".join(found)


CAPTION = (
    "Two cores of an Intel Xeon (Emerald Rapids, with AMX), nothing beside. Two figures: with\n"
    "glibc's allocator as it is / with one that keeps freed memory. PyTorch 2.13.0, TRL 1.16.0,\n"
    "Liger 0.8.5; the careful eager loop is plain PyTorch with what a good user would do by hand."
)
TABLES: dict[str, tuple[Callable[[Rows], Iterator[str]], str]] = {
    "head": (
        head_table,
        "A DPO loss with its gradients (4,096 tokens, 576 wide, a vocabulary of 49,152): share of "
        "the speed of the\nbare matrix products, and peak memory beside weights and inputs, with "
        "glibc's allocator as it is.",
    ),
    "dpo-step": (
        steps_table,
        "DPO steps (a Llama of 28M parameters, 4 pairs, float32).",
    ),
    "ppo-step": (
        steps_table,
        "PPO iterations of the same model, 64 new tokens: GAE with a value model of its own, 16 "
        "answers, 4\nepochs; RLOO, 4 answers to each of 4 prompts, 2 epochs; GRPO, the same, "
        "longer prompts, 1 epoch.\nTRL's RLOO and GRPO are those of its newest release, its PPO "
        "is that of 1.12.0, the last to have it.",
    ),
}


def with_tables(document: str) -> str:
    """Return the document with new tables."""
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
