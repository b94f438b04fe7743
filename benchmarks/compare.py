"""`python -m benchmarks.compare NAME`: implementations side by side, as a table and JSON.

Before a time is printed, every implementation's result is compared with the eager one's.
"""

import argparse
import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.heads import (
    CPU_CASES,
    CUDA_CASES,
    IMPLEMENTATIONS,
    HeadCase,
    forward_backward,
    make_inputs,
    products,
)
from benchmarks.measure import measure

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# |loss - eager loss| / |eager loss|: rounding of the logits to the dtype is the eager one's own.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Row:
    """One line of the table; the JSON file is a list of these."""

    case: str
    implementation: str
    dtype: str
    pass_: str
    milliseconds: float
    spread: float
    peak_bytes: int | None
    flops: int
    products_milliseconds: float
    fraction_of_products: float


def compare_case(
    name: str, case: HeadCase, device: str, dtype_name: str, num_rounds: int
) -> list[Row]:
    """Checks agreement, then measures one case's implementations and its bare products."""
    dtype = DTYPES[dtype_name]
    inputs = make_inputs(case, device, dtype)
    functions = IMPLEMENTATIONS[name]
    truth = forward_backward(functions["eager"], inputs)
    for implementation, function in functions.items():
        error = float((forward_backward(function, inputs) - truth).abs() / truth.abs())
        if error > AGREEMENT[dtype]:
            raise SystemExit(f"{case.name}: {implementation} differs from eager by {error:.2e}")
    calls = {
        implementation: functools.partial(forward_backward, function, inputs)
        for implementation, function in functions.items()
    }
    measured = measure(
        {**calls, "products": functools.partial(products, inputs)}, device, num_rounds=num_rounds
    )
    bare = measured["products"].milliseconds
    return [
        Row(
            case=case.name,
            implementation=implementation,
            dtype=dtype_name,
            pass_="forward+backward",
            milliseconds=measured[implementation].milliseconds,
            spread=measured[implementation].spread,
            peak_bytes=measured[implementation].peak_bytes,
            flops=case.flops(3),
            products_milliseconds=bare,
            fraction_of_products=bare / measured[implementation].milliseconds,
        )
        for implementation in functions
    ]


def print_table(rows: list[Row]) -> None:
    """The rows, aligned, for a person."""
    print(
        f"{'case':24}{'implementation':16}{'dtype':10}{'ms':>9}{'spread':>8}{'peak MiB':>10}"
        f"{'products ms':>13}{'of products':>13}"
    )
    for row in rows:
        peak = "?" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
        print(
            f"{row.case:24}{row.implementation:16}{row.dtype:10}{row.milliseconds:9.1f}"
            f"{row.spread:8.0%}{peak:>10}{row.products_milliseconds:13.1f}"
            f"{row.fraction_of_products:13.0%}"
        )


def main() -> None:
    """Parses the command line, runs every case, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("name", choices=sorted(IMPLEMENTATIONS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: float32 on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each implementation")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    dtype_name = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    cases = CUDA_CASES if arguments.device == "cuda" else CPU_CASES
    rows = [
        row
        for case in cases
        for row in compare_case(
            arguments.name, case, arguments.device, dtype_name, arguments.rounds
        )
    ]
    print_table(rows)
    if arguments.json:
        records = [{k.rstrip("_"): v for k, v in asdict(row).items()} for row in rows]
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
