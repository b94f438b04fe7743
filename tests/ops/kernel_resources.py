"""What every GPU kernel takes: registers, shared and local memory. Needs nvcc, and no GPU.

`python -m tests.ops.kernel_resources` prints a line for each kernel and architecture.
"""

import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import triton

from tests.ops.ahead_of_time import ROOT, Resources, compiler, resources_of
from tests.ops.test_triton_compiles import VOCABULARY

ARCHITECTURES = (80, 90, 100)
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_resources(source: Path, architecture: int) -> list[Resources]:
    """Of each kernel in a CUDA source, by readable names."""
    assert NVCC is not None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        options = ["-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-o", str(cubin)]
        subprocess.run([NVCC, *options, str(source)], check=True)
        found = resources_of(cubin, triton.knobs.nvidia.cuobjdump.path)
    demangle = shutil.which("cu++filt", path=str(Path(NVCC).parent)) or "c++filt"
    names = "\n".join(one.kernel for one in found)
    done = subprocess.run([demangle], input=names, capture_output=True, text=True, check=True)
    readable = [
        line.replace("(anonymous namespace)::", "").removeprefix("void ").split("(")[0]
        for line in done.stdout.splitlines()
    ]
    return [
        replace(one, kernel=f"{source.name}: {name}")
        for name, one in zip(readable, found, strict=True)
    ]


def main() -> None:
    """Prints the table."""
    print(
        f"{'kernel':92}{'sm':>5}{'registers':>11}{'shared':>8}{'local':>7}{'accesses':>10}{'fewest':>8}"
    )
    for architecture in ARCHITECTURES:
        with compiler() as compile_for:
            rows = [
                one
                for everything in (False, True)
                for one in compile_for(architecture, VOCABULARY, everything=everything)
            ]
        if NVCC is not None:
            for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
                rows += cuda_resources(source, architecture)
        for row in rows:
            name = f"{row.kernel}: {row.launch}" if row.launch else row.kernel
            accesses = f"{row.accesses:10}{row.fewest_accesses:8}" if row.launch else ""
            print(
                f"{name:92}{architecture:5}{row.registers:11}{row.shared_bytes:8}"
                f"{row.local_bytes:7}{accesses}"
            )


if __name__ == "__main__":
    main()
