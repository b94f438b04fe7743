"""The CPU library stays inside its arrays: AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ops.test_native_build import ROOT, build

DRIVER = sorted(Path(__file__).parent.glob("sanitized_*.cpp"))
FLAGS = ["-std=c++17", "-O1", "-g1", "-pthread"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    # detect_leaks needs ptrace, which containers often forbid
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    # vLLM, in a process that ran it before, preloads libraries: the sanitizers' must be the first
    environment = {**os.environ, **options, "LD_PRELOAD": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver's program, beside a library that setup.py built with sanitizers."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "empty.cpp").write_text("int main() { return 0; }\n")
    empty = run("g++", *SANITIZERS, folder / "empty.cpp", "-o", folder / "empty")
    started = run(folder / "empty") if empty.returncode == 0 else empty
    if started.returncode != 0:
        said = started.stderr.strip() or f"exit code {started.returncode}"
        pytest.skip(f"needs the sanitizers' runtime: {said}")
    options = {"CXX": "g++", "NVCC": "none", "CUDA_HOME": str(folder), "FASTALIGN_SANITIZE": "1"}
    printed, _ = build(folder, **options)
    library = next(folder.glob("build/lib*/fastalign/_native/libfastalign_cpu.so"), None)
    assert library is not None, printed
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


def test_every_entry_point_stays_inside_its_arrays(driver: Path) -> None:
    done = run(driver)
    assert done.returncode == 0, done.stderr[-4000:]


def test_one_element_too_many_is_caught(driver: Path) -> None:
    done = run(driver, "short")
    assert done.returncode != 0
    assert "AddressSanitizer: SEGV" in done.stderr
    assert "fastalign_gae_cpu" in done.stderr


def test_the_driver_calls_every_entry_point_of_the_cpu_library() -> None:
    declared = set(re.findall(r"\b(fastalign_\w+_cpu)\(", (ROOT / "csrc/abi.h").read_text()))
    called = set(re.findall(r"\b(fastalign_\w+_cpu)\(", "".join(p.read_text() for p in DRIVER)))
    assert declared
    assert called == declared
