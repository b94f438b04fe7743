"""Compiles Triton kernels for a GPU that is not here as they are launched, in its own process.

`python -m tests.ops.ahead_of_time ARCHITECTURE COLUMNS EVERYTHING [ONLY_ROWS]` runs the launchers
of `launches.py` on tensors of a CPU, under the driver of a GPU that is not here: kernels are
compiled and not launched. So the types, and the divisibility by 16 of addresses and sizes, for
which Triton specialises a kernel, are those of a launch. It prints what each kernel takes. Without
arguments it does so for each line of its input, a list of them in JSON.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.ops.launches import Launch, launches

ROOT = Path(__file__).parents[2]
ACCESS_BITS = 128  # the widest access to memory before sm_100
ELEMENT_BITS = {"i8": 8, "bf16": 16, "f16": 16, "f32": 32, "i64": 64}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        kernel: name of the kernel.
        registers: registers of a thread.
        shared_bytes: shared memory of a block.
        local_bytes: local memory of a thread: its stack, where spilt registers are.
        launch: name of the launch; empty for CUDA's.
        reads_rows: True if the kernel works on long rows.
        accesses: loads and stores of global memory in its PTX.
        fewest_accesses: as many as its source asks for if each moves 128 bits of a block.
        widest_access: bits of the widest of them.
        descriptor_loads: loads of whole blocks into shared memory, by a descriptor.
        warpgroup_products: products of blocks in shared memory, by Hopper's tensor cores.
    """

    kernel: str
    registers: int
    shared_bytes: int
    local_bytes: int
    launch: str = ""
    reads_rows: bool = False
    accesses: int = 0
    fewest_accesses: int = 0
    widest_access: int = 0
    descriptor_loads: int = 0
    warpgroup_products: int = 0


def resources_of(cubin: Path, dump: str) -> list[Resources]:
    """Of each kernel in a compiled file, by `cuobjdump -res-usage`."""
    done = subprocess.run(
        [dump, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    )
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return [
        Resources(name, int(registers), int(shared), int(stack) + int(local))
        for name, registers, stack, shared, local in re.findall(pattern, done.stdout)
    ]


def access_bits(ptx: str) -> list[int]:
    """Bits of every load and store of global memory in a kernel's PTX."""
    pattern = r"\b(?:ld|st)\.global(?:\.(?!v\d|[busf]\d)[\w:]+)*(?:\.v(\d))?\.[busf](\d+)\b"
    return [int(width or 1) * int(bits) for width, bits in re.findall(pattern, ptx)]


def fewest_accesses(ttgir: str, threads: int) -> int:
    """As many accesses as suffice for a kernel in Triton's own language.

    A thread's part of a block takes 128 bits an access; a number of the row takes one.
    """
    pattern = r"tt\.(?:load|store) %.* : (?:tensor<(\d+)x)?!tt\.ptr<(\w+)>"
    parts = [
        int(size or 0) * ELEMENT_BITS[element] // threads
        for size, element in re.findall(pattern, ttgir)
    ]
    return sum(max(bits // ACCESS_BITS, 1) for bits in parts)


def _resources(launch: Launch, kernel: str, compiled: Any, dump: str) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (used,) = resources_of(Path(file.name), dump)
    ptx = compiled.asm["ptx"]
    return Resources(
        kernel,
        used.registers,
        compiled.metadata.shared,
        used.local_bytes,
        launch.name,
        launch.reads_rows,
        len(access_bits(ptx)),
        fewest_accesses(compiled.asm["ttgir"], 32 * compiled.metadata.num_warps),
        max(access_bits(ptx), default=0),
        ptx.count("cp.async.bulk.tensor"),
        ptx.count("wgmma.mma_async"),
    )


class AbsentGpu:
    """Triton's driver of a GPU that is not here, as far as compiling asks for it."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_launches(
    architecture: int, num_columns: int, everything: int, only_rows: int = 0
) -> list[Resources]:
    """What every launch takes, in a process that launches nothing else."""
    import triton
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from fastalign.ops import triton_table

    driver.set_active(AbsentGpu(architecture))
    triton_table._capability = lambda device: architecture  # type: ignore[assignment]
    compile_or_launch, found = JITFunction.run, []

    def compile_only(kernel: Any, *args: Any, warmup: bool, **options: Any) -> None:
        compiled = compile_or_launch(kernel, *args, warmup=True, **options)
        found.append((kernel.fn.__name__, compiled))

    JITFunction.run = compile_only
    dump, taken = triton.knobs.nvidia.cuobjdump.path, []
    for launch in launches(num_columns, bool(everything)):
        if architecture < launch.oldest or (only_rows and not launch.reads_rows):
            continue
        found.clear()
        launch.run()
        assert found, launch
        taken += [_resources(launch, kernel, compiled, dump) for kernel, compiled in found]
    return taken


@contextmanager
def compiler() -> Iterator[Callable[..., list[Resources]]]:
    """Give the function that tells what launches of Triton kernels take on sm_<architecture>.

    Its arguments are an architecture, a number of columns, `everything` (all options, or none) and
    `only_rows` (the kernels on rows alone). One process imports PyTorch and Triton without its
    interpreter; each call is a fork of it.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.ahead_of_time"]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=errors, text=True
        ) as process,
    ):
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None

        def compile_for(
            architecture: int, num_columns: int, *, everything: bool, only_rows: bool = False
        ) -> list[Resources]:
            request = [architecture, num_columns, int(everything), int(only_rows)]
            print(json.dumps(request), file=requests, flush=True)
            line = answers.readline()
            errors.seek(0)
            assert line, (request, errors.read()[-2000:])
            return [Resources(**found) for found in json.loads(line)]

        yield compile_for


def answer_requests() -> None:
    """Print, for each line of the input, what the launches take, as JSON."""
    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        # What a compiler prints goes to the errors.
        with ProcessPoolExecutor(1, context, initializer=os.dup2, initargs=(2, 1)) as pool:
            found = pool.submit(compiled_launches, *json.loads(line)).result()
        print(json.dumps([asdict(one) for one in found]), flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps([asdict(one) for one in compiled_launches(*map(int, sys.argv[1:]))]))
    else:
        answer_requests()
