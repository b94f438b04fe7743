"""The packages that scripts/packages.sh builds: their contents, and each one installed and used."""

import os
import shutil
import subprocess
import sys
import tarfile
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest

from fastalign.ops.native_library import library_path

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "fastalign", "scripts", "tests")
FILES = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md"),
    *("Dockerfile", "constraints.txt", "mkdocs.yml", "pyproject.toml", "setup.py"),
)
LIBRARY = "fastalign/_native/libfastalign_cpu.so"
# Stands for a C++ compiler: it "links" a library that exists already.
COMPILER = f"""#!{sys.executable}
import shutil, sys
if "-shared" in sys.argv:
    shutil.copy({str(library_path("cpu"))!r}, sys.argv[sys.argv.index("-o") + 1])
"""
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


class Packages(NamedTuple):
    sources: Path
    plain: Path
    native: Path | None  # None: this checkout has no library


def build(hook: str, source: Path, out: Path, **environment: str) -> Path:
    done = subprocess.run(
        [sys.executable, "-c", BUILD, hook, str(out)],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    folder = tmp_path_factory.mktemp("packages")
    source = folder / "checkout"
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    # As a checkout has it where the package is installed editable; no package may carry it along.
    (source / LIBRARY).parent.mkdir(exist_ok=True)
    (source / LIBRARY).write_bytes(b"stale")
    sources = build("build_sdist", source, folder, FASTALIGN_NATIVE="0")
    with tarfile.open(sources) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sources.name.removesuffix(".tar.gz")
    (unpacked / LIBRARY).parent.mkdir(exist_ok=True)
    (unpacked / LIBRARY).write_bytes(b"stale")
    plain = build("build_wheel", unpacked, folder, FASTALIGN_NATIVE="0")
    if not library_path("cpu").is_file():
        return Packages(sources, plain, None)
    compiler = folder / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    chosen = {"CXX": str(compiler), "NVCC": "none", "CUDA_HOME": str(folder)}
    return Packages(sources, plain, build("build_wheel", unpacked, folder, **chosen))


def files_below(folder: Path) -> set[str]:
    """Every file of a checkout's folder, less what Python and compilers write there."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".so", ".pyc")
    }


def test_the_sources_have_everything_that_builds_tests_and_documents(packages: Packages) -> None:
    with tarfile.open(packages.sources) as archive:
        names = {member.name for member in archive if member.isfile()}
    held = {name.partition("/")[2] for name in names}
    wanted = set(FILES).union(*(files_below(ROOT / name) for name in FOLDERS))
    assert wanted - held == set()
    written = {"PKG-INFO", "setup.cfg"}
    assert {name for name in held - wanted - written if ".egg-info/" not in name} == set()


def test_a_wheel_without_native_code_is_for_every_machine(packages: Packages) -> None:
    assert packages.plain.name.endswith("-py3-none-any.whl")
    with ZipFile(packages.plain) as wheel:
        names = set(wheel.namelist())
    assert {name for name in names if ".dist-info/" not in name} == files_below(ROOT / "fastalign")
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_a_wheel_with_native_code_is_for_every_python_of_the_platform(packages: Packages) -> None:
    if packages.native is None:
        pytest.skip("needs the CPU library")
    assert "-py3-none-linux_" in packages.native.name
    with ZipFile(packages.native) as wheel:
        assert wheel.read(LIBRARY) == library_path("cpu").read_bytes()


def test_what_only_some_need_is_an_extra(packages: Packages) -> None:
    with ZipFile(packages.plain) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    needed = metadata.get_all("Requires-Dist", [])
    always = {line.split(">=")[0] for line in needed if "extra ==" not in line}
    assert {"torch", "transformers"} <= always
    assert not always & {"triton", "matplotlib", "tensorboard", "peft", "vllm"}
    assert {"triton", "report", "tensorboard"} <= set(metadata.get_all("Provides-Extra", []))
    assert metadata["License-Expression"] == "Apache-2.0"


def install(package: Path, target: Path) -> None:
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    line += ["--disable-pip-version-check", "--target", str(target), str(package)]
    subprocess.run(line, check=True, capture_output=True)


def checked(*arguments: str, target: Path | str = "") -> subprocess.CompletedProcess[str]:
    """`scripts/check_package.py`, with no compiler on PATH."""
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/check_package.py"), *arguments],
        env={"HOME": str(target), "PYTHONPATH": str(target or ROOT), "PATH": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "reference"])
def test_an_installed_wheel_trains_without_a_compiler(
    kind: str, packages: Packages, tmp_path: Path
) -> None:
    package = packages.native if kind == "native" else packages.plain
    if package is None:
        pytest.skip("needs the CPU library")
    install(package, tmp_path)
    done = checked(kind, target=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "two DPO steps" in done.stdout


def test_the_check_refuses_the_checkout_itself() -> None:
    done = checked("native")
    assert done.returncode == 1
    assert "fastalign is this checkout" in done.stderr
