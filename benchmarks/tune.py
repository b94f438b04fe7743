"""`python -m benchmarks.tune`: tune the Triton kernels' blocks and warps on this GPU.

Writes the fastest configurations into `fastalign/ops/triton_table.json` for GPUs of this compute
capability or newer; entries for older ones stay. With `--product` it tunes a head's own product
(backend "epilogue") instead, and notes whether that is faster than the library's product and a
pass: only then "auto" takes it.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.head_paths import logprob
from benchmarks.heads import CASES, forward_only, make_inputs
from benchmarks.measure import Measurement, measure
from benchmarks.passes import Pass, head_tile_passes, kl_tile_passes, logit_passes
from fastalign.ops.triton_table import (
    PRODUCT,
    TABLE,
    Configuration,
    ProductConfiguration,
    read_products,
    read_table,
)

BLOCKS = (1024, 2048, 4096, 8192)
NUM_WARPS = (4, 8, 16)
ROUNDS = 10
# Rows, columns and warps of a product's tile: two of the third fit beside one another.
TILES = ((128, 256, 8), (256, 128, 8), (128, 128, 4))
NUM_STAGES = (3, 4)
GROUP_ROWS = (8, 32)


def fastest(passes: Sequence[Pass], candidates: Sequence[Configuration]) -> Configuration:
    """Return the candidate with the least time over a kernel's passes, measured interleaved."""
    table = read_table()
    calls = {}
    for index, candidate in enumerate(candidates):

        def call(candidate: Configuration = candidate) -> None:
            for one in passes:
                assert one.kernel is not None
                table[one.kernel] = [candidate]
                one.run(backend="triton")

        calls[str(index)] = call
    kept = {one.kernel: table[one.kernel] for one in passes if one.kernel}
    measured = measure(calls, "cuda", num_rounds=ROUNDS)
    table.update(kept)
    best = min(measured, key=lambda name: measured[name].milliseconds)
    return candidates[int(best)]


def tuned(dtype: torch.dtype) -> dict[str, Configuration]:
    """Return the best configuration of each kernel of the table on this GPU."""
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    candidates = [
        Configuration(10 * major + minor, block, num_warps, name)
        for block, num_warps in itertools.product(BLOCKS, NUM_WARPS)
    ]
    makers = (logit_passes, head_tile_passes, kl_tile_passes)
    passes = [one for make in makers for one in make("cuda", dtype)]
    return {
        kernel: fastest([one for one in passes if one.kernel == kernel], candidates)
        for kernel in read_table()
        if any(one.kernel == kernel for one in passes)
    }


def product_candidates(capability: int, name: str) -> list[ProductConfiguration]:
    """Return the configurations to try for bfloat16 operands: each fits into shared memory."""
    return [
        ProductConfiguration(capability, 2, *tile, 64, group, num_warps, stages, False, name)
        for (*tile, num_warps), stages, group in itertools.product(TILES, NUM_STAGES, GROUP_ROWS)
    ]


def fastest_product(
    candidates: Sequence[ProductConfiguration],
    call: Callable[[str], object],
    timer: Callable[[Mapping[str, Callable[[], object]]], Mapping[str, Measurement]],
) -> ProductConfiguration:
    """Return the candidate with the least time, preferred if that is less than the library's.

    Args:
        candidates: configurations to try.
        call: runs the forward by a backend.
        timer: measures named calls, interleaved.
    """
    table = read_products()
    kept = list(table)

    def run(candidate: ProductConfiguration) -> None:
        table[:] = [candidate]
        call("epilogue")

    def library() -> None:
        table[:] = [replace(candidates[0], preferred=False)]
        call("auto")

    calls: dict[str, Callable[[], object]] = {
        str(index): partial(run, candidate) for index, candidate in enumerate(candidates)
    }
    measured = timer({"library": library, **calls})
    table[:] = kept
    milliseconds = {name: one.milliseconds for name, one in measured.items()}
    of_library = milliseconds.pop("library")
    best = min(milliseconds, key=lambda name: milliseconds[name])
    print(f"{PRODUCT}: {milliseconds[best]:.3f} ms, the library and a pass {of_library:.3f} ms")
    return replace(candidates[int(best)], preferred=milliseconds[best] < of_library)


def tuned_product() -> dict[str, ProductConfiguration]:
    """Return the best configuration of a head's own product, at an 8B model's head."""
    major, minor = torch.cuda.get_device_capability()
    candidates = product_candidates(10 * major + minor, torch.cuda.get_device_name())
    inputs = make_inputs(CASES["llama-3-8b"], "cuda", torch.bfloat16)

    def call(backend: str) -> object:
        return forward_only(partial(logprob, backend=backend), inputs)

    timer = partial(measure, device="cuda", num_rounds=ROUNDS)
    return {PRODUCT: fastest_product(candidates, call, timer)}


def merged(table: Mapping[str, Sequence[Any]], found: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the table with new entries in place of those for the same capability."""
    result = {kernel: list(entries) for kernel, entries in table.items()}

    def place(entry: Any) -> tuple[int, int | None]:
        return entry.from_capability, getattr(entry, "element_bytes", None)

    for kernel, configuration in found.items():
        others = [entry for entry in table[kernel] if place(entry) != place(configuration)]
        result[kernel] = sorted([*others, configuration], key=lambda entry: entry.from_capability)
    return result


def write_table(table: Mapping[str, Sequence[Any]], path: Path = TABLE) -> None:
    """Write the table with one line per kernel."""
    lines = [
        f" {json.dumps(kernel)}: {json.dumps([asdict(entry) for entry in entries])}"
        for kernel, entries in table.items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    """Run the tuning, print and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument(
        "--table", type=Path, default=TABLE, help="file to write, in place of the package's"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--product", action="store_true", help="a head's own product, no others")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    dtype = getattr(torch, arguments.dtype)
    found: Mapping[str, Any] = tuned_product() if arguments.product else tuned(dtype)
    for kernel, configuration in found.items():
        print(f"{kernel:28} {configuration}")
    write_table(merged({**read_table(), PRODUCT: read_products()}, found), arguments.table)


if __name__ == "__main__":
    main()
