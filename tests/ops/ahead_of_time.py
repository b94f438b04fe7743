"""Compiles Triton kernels ahead of time for a GPU that is not here, in a process of its own.

`python -m tests.ops.ahead_of_time ARCHITECTURE < entries.json` prints, for each entry, what the
compiled kernel takes.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Entry:
    """One kernel to compile: the types of its arguments, and its constants."""

    module: str
    kernel: str
    types: dict[str, str]  # argument to "*fp32", "i64", ...; "*fp32" for other *_ptr
    constants: dict[str, Any]
    num_warps: int = 8


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes; what is on its stack has been spilt."""

    kernel: str
    registers: int
    shared_bytes: int
    stack_bytes: int


def resources_of(cubin: Path, dump: str) -> list[Resources]:
    """Of each kernel in a compiled file, by `cuobjdump -res-usage`."""
    done = subprocess.run(
        [dump, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    )
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    return [
        Resources(name, int(registers), int(shared), int(stack))
        for name, registers, stack, shared in re.findall(pattern, done.stdout)
    ]


def _compile(entry: Entry, architecture: int) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(entry.module), entry.kernel)
    signature = {}
    for name in kernel.arg_names:
        default = "*fp32" if name.endswith("_ptr") else "i64"
        signature[name] = "constexpr" if name in entry.constants else entry.types.get(name, default)
    source = ASTSource(kernel, signature, constexprs=entry.constants)
    target = GPUTarget("cuda", architecture, 32)
    found = triton.compile(source, target=target, options={"num_warps": entry.num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        (used,) = resources_of(Path(file.name), triton.knobs.nvidia.cuobjdump.path)
    return replace(used, kernel=entry.kernel, shared_bytes=found.metadata.shared)


def compile_for(architecture: int, entries: list[Entry]) -> list[Resources]:
    """What each entry takes on sm_<architecture>."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.ahead_of_time", str(architecture)],
        input=json.dumps([asdict(entry) for entry in entries]),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = json.loads(done.stdout.splitlines()[-1])
    assert len(compiled) == len(entries)
    return [Resources(**found) for found in compiled]


if __name__ == "__main__":
    wanted = [Entry(**entry) for entry in json.load(sys.stdin)]
    print(json.dumps([asdict(_compile(entry, int(sys.argv[1]))) for entry in wanted]))
