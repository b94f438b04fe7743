"""Builds the native libraries where there are compilers; installs without them elsewhere.

They have a plain C ABI (csrc/abi.h): building needs no torch, and the CUDA one nvcc but no GPU.
FASTALIGN_NATIVE=0 builds nothing. CXX and NVCC name other compilers, FASTALIGN_CUDA_ARCHITECTURES
("90" or "80 90") the GPUs to compile for. FASTALIGN_GLIBC=2.28 makes libraries that also run with
that version of glibc and all later ones (scripts/packages.sh). FASTALIGN_SANITIZE=1 builds a CPU
library that stops at the first access outside an array, for the tests.
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CPU_SOURCE = Path("csrc/cpu")
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}
# Two files need instructions beyond these; they are called only where the processor has them.
BF16_FLAGS = {
    "product_avx512bf16": [*ISA_FLAGS["avx512"], "-mavx512bf16"],
    "product_amx": [*ISA_FLAGS["avx512"], "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
OPTIMISED = ["-O3"]
SANITIZED = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
CUDA_ARCHITECTURES = os.environ.get("FASTALIGN_CUDA_ARCHITECTURES", "80 90 100").split()


def find_compilers():
    """Return the compilers that are there: {"cpu": "g++", "cuda": "/.../nvcc"}."""
    if os.environ.get("FASTALIGN_NATIVE", "1") == "0":
        return {}
    cxx = os.environ.get("CXX") or next(
        (c for c in ("g++", "clang++", "c++") if shutil.which(c)), None
    )
    root = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which(f"{root}/bin/nvcc")
    found = {"cpu": cxx and shutil.which(cxx), "cuda": nvcc and cxx and shutil.which(nvcc)}
    return {device: path for device, path in found.items() if path}


def cpu_commands(cxx, build, library):
    """Commands that compile, and the one that links: *_rows.cpp for each instruction set here."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    common = [
        cxx,
        "-std=c++17",
        *(SANITIZED if os.environ.get("FASTALIGN_SANITIZE") == "1" else OPTIMISED),
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
        "-pthread",
    ]
    defines = ["-DFASTALIGN_X86"] if x86 else []
    compiled = {}  # object: source and flags
    for source in sorted(CPU_SOURCE.glob("*.cpp")):
        if source.stem.endswith("_rows"):
            for isa, flags in ISA_FLAGS.items():
                if isa == "portable" or x86:
                    compiled[f"{source.stem}_{isa}"] = [source, *flags, f"-DFASTALIGN_ISA={isa}"]
        elif source.stem not in BF16_FLAGS:
            compiled[source.stem] = [source]
        elif x86:
            compiled[source.stem] = [source, *BF16_FLAGS[source.stem]]
    commands = [
        [*common, *defines, "-c", *map(str, what), "-o", str(build / f"{name}.o")]
        for name, what in compiled.items()
    ]
    objects = [command[-1] for command in commands]
    return commands, [*common, "-shared", *objects, "-o", str(library)]


def cuda_commands(nvcc, build, library):
    """Return the same for CUDA: code for each architecture, and the oldest's PTX for others."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
    oldest = CUDA_ARCHITECTURES[0]
    codes.append(f"-gencode=arch=compute_{oldest},code=compute_{oldest}")
    common = [nvcc, "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    commands = [
        [*common, *codes, "-c", str(source), "-o", str(build / f"{source.stem}_cuda.o")]
        for source in sorted(Path("csrc/cuda").glob("*.cu"))
    ]
    objects = [command[-1] for command in commands]
    return commands, [*common, "-shared", *objects, "-o", str(library)]


def output(command):
    """Return what a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def glibc_stubs(cxx, build, oldest):
    """Make stubs of glibc, and return a linker's arguments that put them before the real one.

    A linker takes a symbol's newest version. The stubs have the newest that `oldest` knows, under
    glibc's own names, so that the dynamic loader finds the functions themselves. Before glibc 2.34,
    threads and `dlopen` were in libraries of their own, which the result asks for, too.
    """
    if not re.fullmatch(r"\d+\.\d+", oldest):
        raise SystemExit(f"FASTALIGN_GLIBC: expected a version such as 2.28, got {oldest!r}")
    wanted = tuple(map(int, oldest.split(".")))
    stubs = ["--no-as-needed"]
    for name in ("libc.so.6", "libm.so.6"):
        versions = {}  # symbol: its versions, and whether a linker takes them
        exported = output(["objdump", "-T", output([cxx, f"-print-file-name={name}"]).strip()])
        for hidden, version, symbol in re.findall(
            r" (\(?)GLIBC_([\d.]+)\)? +(\w+)$", exported, flags=re.MULTILINE
        ):
            number = tuple(map(int, version.split(".")))
            versions.setdefault(symbol, {})[number] = not hidden
        nodes = {}  # version: the symbols that are taken in it
        for symbol, known in versions.items():
            older = [number for number in known if number <= wanted]
            if older and any(known[number] for number in known if number > wanted):
                nodes.setdefault(max(older), []).append(symbol)
        stub = build / name
        script = [
            f"GLIBC_{'.'.join(map(str, number))} {{ {'; '.join(symbols)}; }};"
            for number, symbols in sorted(nodes.items())
        ]
        labels = [
            f".globl {symbol}\n.type {symbol}, @function\n{symbol}:"
            for symbols in nodes.values()
            for symbol in symbols
        ]
        stub.with_suffix(".map").write_text("\n".join([*script, ""]))
        stub.with_suffix(".s").write_text("\n".join([*labels, ""]))
        command = [cxx, "-shared", "-nostdlib", str(stub.with_suffix(".s")), "-o", str(stub)]
        output([*command, f"-Wl,-soname,{name},--version-script,{stub.with_suffix('.map')}"])
        stubs.append(str(stub))
    for name in ("libpthread.so.0", "libdl.so.2", "librt.so.1"):
        stubs.append(output([cxx, f"-print-file-name={name}"]).strip())
    return [word for stub in stubs for word in ("-Xlinker", stub)]  # nvcc takes them, too


def failure(command):
    """Run a command; return the last line of its error, or None."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]


class BuildNative(build_ext):
    """Compiles `fastalign/_native/lib*.so` with the compilers; a failure is a note only."""

    def run(self):
        """Make the folder first: an editable installation copies into it without making it."""
        Path("fastalign/_native").mkdir(exist_ok=True)
        super().run()

    def get_ext_filename(self, fullname):
        """Plain names: these are libraries for ctypes, not Python modules."""
        return str(Path(*fullname.split(".")[:-1]) / f"{fullname.split('.')[-1]}.so")

    def build_extension(self, ext):
        """Run the commands of one library."""
        device = ext.name.rsplit("_", 1)[-1]
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp)
        build.mkdir(parents=True, exist_ok=True)
        make = {"cpu": cpu_commands, "cuda": cuda_commands}[device]
        commands, link = make(COMPILERS[device], build, library)
        if oldest := os.environ.get("FASTALIGN_GLIBC"):
            link += glibc_stubs(COMPILERS["cpu"], build, oldest)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            failures = [reason for reason in pool.map(failure, commands) if reason]
        reason = failures[0] if failures else failure(link)
        if reason is not None:
            library.unlink(missing_ok=True)
            print(f"note: fastalign is installed without native {device} code: {reason}")


class WheelForAnyPython(bdist_wheel):
    """Tags a wheel for every Python 3: the libraries have a C ABI and know nothing of Python's."""

    def get_tag(self):
        """Return (python, abi, platform)."""
        return "py3", "none", super().get_tag()[2]


COMPILERS = find_compilers()
for name, wanted in (("cpu", "a C++ compiler"), ("cuda", "nvcc")):
    if name not in COMPILERS:
        print(
            f"note: no native {name} code will be built ({wanted} not found, or FASTALIGN_NATIVE=0)"
        )

setup(
    ext_modules=[
        Extension(f"fastalign._native.libfastalign_{device}", sources=[], optional=True)
        for device in COMPILERS
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": WheelForAnyPython},
)
