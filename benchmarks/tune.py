"""`python -m benchmarks.tune`: tune the Triton kernels' blocks and warps on this GPU.

Writes the fastest configurations into `fastalign/ops/triton_table.json` for GPUs of this compute
capability or newer; entries for older ones stay.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.measure import measure
from benchmarks.passes import Pass, head_tile_passes, kl_tile_passes, logit_passes
from fastalign.ops.triton_table import TABLE, Configuration, read_table

BLOCKS = (1024, 2048, 4096, 8192)
NUM_WARPS = (4, 8, 16)
ROUNDS = 10


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


def merged(
    table: dict[str, list[Configuration]], found: dict[str, Configuration]
) -> dict[str, list[Configuration]]:
    """Return the table with new entries in place of those for the same capability."""
    result = dict(table)
    for kernel, configuration in found.items():
        others = [
            entry
            for entry in table[kernel]
            if entry.from_capability != configuration.from_capability
        ]
        result[kernel] = sorted([*others, configuration], key=lambda entry: entry.from_capability)
    return result


def write_table(table: dict[str, list[Configuration]], path: Path = TABLE) -> None:
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
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    found = tuned(getattr(torch, arguments.dtype))
    for kernel, configuration in found.items():
        print(f"{kernel:28} block {configuration.block:5} warps {configuration.num_warps:3}")
    write_table(merged(read_table(), found), arguments.table)


if __name__ == "__main__":
    main()
