"""The CPU library stays inside its arrays: AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ops.head.head_tile.head_tile_cases import ISAS
from tests.ops.test_native_build import ROOT, build

DRIVER = sorted(Path(__file__).parent.glob("sanitized_*.cpp"))
# A compiler that leaves the sanitizers out of the narrower vectors' objects, which are compiled
# from the same sources; with them these would take longer than all others together.
COMPILER = """#!/bin/sh
case "$*" in {narrower}) exec g++ "$@" -O0 -fno-sanitize=all ;; esac
exec g++ "$@"
"""
FLAGS = ["-std=c++17", "-O1", "-g1", "-pthread"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    # detect_leaks needs ptrace, which containers often forbid
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    # vLLM, in a process that ran it before, preloads libraries: the sanitizers' must be the first
    environment = {**os.environ, **options, "LD_PRELOAD": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Built:
    """A folder with what setup.py built there from the CPU's sources.

    Attributes:
        folder: path of the copied sources, `build` among them.
        libraries: file names of the libraries.
        printed: output of the build.
        unusable: why no program with sanitizers runs here; the build has none then.
    """

    folder: Path
    libraries: list[str]
    printed: str
    unusable: str | None


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The CPU library with sanitizers, or without them where they do not run."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "empty.cpp").write_text("int main() { return 0; }\n")
    empty = run("g++", *SANITIZERS, folder / "empty.cpp", "-o", folder / "empty")
    started = run(folder / "empty") if empty.returncode == 0 else empty
    unusable = None
    options = {"CXX": "g++", "NVCC": "none", "CUDA_HOME": str(folder)}
    if started.returncode == 0:
        compiler = folder / "compiler"
        narrower = " | ".join(f"*FASTALIGN_ISA={isa}*" for isa in ISAS[:-1])
        compiler.write_text(COMPILER.format(narrower=narrower or "none"))
        compiler.chmod(0o755)
        options |= {"CXX": str(compiler), "FASTALIGN_SANITIZE": "1"}
    else:
        unusable = started.stderr.strip() or f"exit code {started.returncode}"
    printed, libraries = build(folder, **options)
    return Built(folder, libraries, printed, unusable)


@pytest.fixture(scope="module")
def driver(built: Built) -> Path:
    """The driver's program, beside the library with sanitizers."""
    if built.unusable is not None:
        pytest.skip(f"needs the sanitizers' runtime: {built.unusable}")
    folder = built.folder
    library = next(folder.glob("build/lib*/fastalign/_native/libfastalign_cpu.so"), None)
    assert library is not None, built.printed
    done = run(
        "g++",
        *FLAGS,
        *SANITIZERS,
        f"-I{ROOT / 'csrc'}",
        *DRIVER,
        library,
        f"-Wl,-rpath,{library.parent}",
        "-o",
        folder / "driver",
    )
    assert done.returncode == 0, done.stderr
    return folder / "driver"


def test_a_compiler_builds_the_cpu_library(built: Built) -> None:
    """The build without sanitizers is that of the installation, whose library all tests load."""
    assert built.libraries == ["libfastalign_cpu.so"]


def test_every_entry_point_stays_inside_its_arrays(driver: Path) -> None:
    done = run(driver)
    assert done.returncode == 0, done.stderr[-4000:]


def test_one_element_too_many_is_caught(driver: Path) -> None:
    done = run(driver, "short")
    assert done.returncode != 0
    assert "AddressSanitizer: SEGV" in done.stderr
    assert "fastalign_gae_cpu" in done.stderr


def test_the_driver_calls_every_entry_point_of_the_cpu_library() -> None:
    header = (ROOT / "csrc/abi.h").read_text()
    declared = set(re.findall(r"\b(fastalign_\w+_cpu)\(", header))
    both = set(re.findall(r"^FASTALIGN_BOTH\((\w+),", header, re.MULTILINE))
    assert both
    declared |= {f"fastalign_{name}_cpu" for name in both}
    called = set(re.findall(r"\b(fastalign_\w+_cpu)\(", "".join(p.read_text() for p in DRIVER)))
    assert declared
    assert called == declared
