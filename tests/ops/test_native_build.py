"""The native sources compile, and setup.py copes without compilers."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastalign.ops.native_library import library_path
from tests.ops.ahead_of_time import resources_of

ROOT = Path(__file__).parents[2]
# Sources of kernels that read rows of a vocabulary.
OF_ROWS = {"head_tile", "head_tile_split", "kl_tile", "token_kl", "token_logprob"}
# Of the library, if the environment of its build named no others.
ARCHITECTURES = (80, 90, 100)
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def build(tmp_path: Path, **environment: str) -> tuple[str, list[str]]:
    """Runs setup.py's build in a copy of the sources; what it printed, and the libraries made."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "fastalign").mkdir()
    (tmp_path / "fastalign" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build"],
        cwd=tmp_path,
        env={**os.environ, "FASTALIGN_NATIVE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    built = tmp_path.glob("build/lib*/fastalign/_native/*")
    return done.stdout, sorted(path.name for path in built)


def test_nothing_is_built_when_that_is_asked_for(tmp_path: Path) -> None:
    printed, libraries = build(tmp_path, FASTALIGN_NATIVE="0")
    assert libraries == []
    assert printed.count("note:") == 2


def test_without_compilers_the_build_succeeds_with_a_note(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    printed, libraries = build(tmp_path, PATH=str(empty), CUDA_HOME=str(empty))
    assert libraries == []
    assert "no native cpu code will be built (a C++ compiler not found" in printed


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_compiler_that_fails_is_a_note(tmp_path: Path) -> None:
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n")
    broken.chmod(0o755)
    printed, libraries = build(tmp_path, CXX=str(broken), NVCC="none", CUDA_HOME=str(tmp_path))
    assert libraries == []
    assert "without native cpu code: no such header" in printed


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_the_cuda_sources_compile_without_spills(tmp_path: Path, source: Path) -> None:
    done = subprocess.run(
        [
            str(NVCC),
            "-std=c++17",
            "-O3",
            "-Werror=all-warnings",
            "-Xptxas=-v",
            "-arch=sm_90",
            "-cubin",  # the host's part is compiled as C++ by the emulation's tests
            str(source),
            "-o",
            str(tmp_path / "out.cubin"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill stores" in line]
    assert spills
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills), spills
    if source.stem in OF_ROWS:
        assert_accesses_are_wide(tmp_path / "out.cubin")


def test_no_kernel_of_the_library_has_local_memory_on_any_architecture() -> None:
    triton = pytest.importorskip("triton")
    library = library_path("cuda")
    if not library.exists():
        pytest.skip("needs the CUDA library")
    kernels = resources_of(library, triton.knobs.nvidia.cuobjdump.path)
    codes = Counter(one.kernel for one in kernels)
    assert len(codes) > 20
    assert set(codes.values()) == {len(ARCHITECTURES)}
    assert {one.local_bytes for one in kernels} == {0}
    # Reductions alone take shared memory that is not asked for: a few words for each warp.
    assert max(one.shared_bytes for one in kernels) <= 2048


def assert_accesses_are_wide(compiled: Path) -> None:
    """No local memory, and 16 bytes at a time in aligned rows, as a head's buffers have them.

    In the machine code for sm_90.
    """
    triton = pytest.importorskip("triton")
    dump = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-arch", "sm_90", str(compiled)]
    done = subprocess.run(dump, capture_output=True, text=True, check=True)
    kernels = re.split(r"Function : (\S+)", done.stdout)[1:]
    names, codes = kernels[::2], kernels[1::2]
    assert names
    for name, code in zip(names, codes, strict=True):
        assert not re.search(r"\b(LDL|STL)\b", code), name
        if "head_tile" in name and "Lb0E" in name:  # rows that are not aligned
            continue
        assert re.search(r"\bLDG\.\S*128\b", code), name
        if "forward_kernel" not in name and "statistics" not in name:
            assert re.search(r"\bSTG\.\S*128\b", code), name
