"""A list of what a machine without a network needs beside torch, Triton and transformers.

The packages, with the versions that are installed or pinned here, as wheels; and the library of
CUDA kernels, built where there is an nvcc.
"""

import importlib.metadata
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import triton
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu_check.native import ARCHITECTURE, BUILD
from benchmarks.gpu_check.runner import ROOT
from fastalign.ops import native_library

PRESENT = ("torch", "triton", "transformers", "setuptools")
# What the stages import: fastalign's trainers, the tests, and the peers.
WANTED = (
    *("tyro", "datasets", "pyyaml", "rich", "tensorboard", "httpx2", "anyio", "jinja2"),
    *("pytest", "pytest-timeout", "pytest-xdist"),
    *("trl", "liger-kernel", "cut-cross-entropy"),
)
# Not installed on a machine without a GPU.
VERSIONS = {"cut-cross-entropy": "25.1.1"}
PYTHON = "3.12"


def requirements(name: str) -> list[str]:
    """Return the packages that an installed one requires, without extras."""
    try:
        found = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    parsed = map(Requirement, found)
    return [one.name for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]


def closure(names: Sequence[str]) -> list[str]:
    """Return the packages and all that they require, by canonical names."""
    found: list[str] = []
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop(0))
        if name not in found:
            found.append(name)
            waiting += requirements(name)
    return found


def pins() -> dict[str, str]:
    """Return the versions of `constraints.txt`."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version for name, version in pairs}


def wheels() -> list[str]:
    """Return NAME==VERSION of every package to carry."""
    known = {**pins(), **VERSIONS}
    present = closure(PRESENT)
    names = sorted(name for name in closure(WANTED) if name not in present)
    return [f"{name}=={known[name]}" if name in known else name for name in names]


def architectures(library: Path) -> list[str]:
    """Return the GPUs that a library has code for, as `90`, by the cuobjdump that Triton ships."""
    command = [triton.knobs.nvidia.cuobjdump.path, "--list-elf", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sorted(set(re.findall(r"sm_(\d+)", done.stdout)))


def library_lines() -> Iterator[str]:
    """Yield which libraries to carry, and how to build that of the GPU."""
    for device in ("cpu", "cuda"):
        path = native_library.library_path(device)
        if not path.is_file():
            yield f"{path.relative_to(ROOT)}: not built here; no stage builds it"
            continue
        size = f"{path.stat().st_size / 2**20:.1f} MiB"
        code = f", code for sm_{', sm_'.join(architectures(path))}" if device == "cuda" else ""
        yield f"{path.relative_to(ROOT)}: {size}{code}"
    yield f"{BUILD}    # builds that of sm_{ARCHITECTURE} alone"


def lines() -> Iterator[str]:
    """Yield everything to carry, with the commands."""
    found = wheels()
    yield f"Wheels for Python {PYTHON}, beside {', '.join(PRESENT)} and what these require:"
    yield "  " + "\n  ".join(found)
    names = " ".join(found)
    yield (
        f"python -m pip download --only-binary=:all: --no-deps --python-version {PYTHON} "
        f"--dest wheels {names}"
    )
    yield "python -m pip install --no-index --no-deps wheels/*.whl    # there"
    yield "Libraries, to be carried in their folder:"
    yield from (f"  {line}" for line in library_lines())
