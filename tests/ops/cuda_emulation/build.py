"""Build `csrc/cuda` as C++ for this CPU, with the headers in `include` in place of CUDA's.

`python -m tests.ops.cuda_emulation.build FOLDER` builds in a folder and prints the library's path.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
# As nvcc, which fuses products with sums; frame pointers are for the sanitizers' reports.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-march=native", "-ffp-contract=fast"]
# Symbols of two libraries in one process stay apart; kernels read values of one type as another.
FLAGS += ["-fvisibility=hidden", "-fno-gnu-unique", "-fno-strict-aliasing", "-Wno-attributes"]
# Compiling is most of what they cost: 13 s without optimisation, 19 with.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0"]
LAUNCH = re.compile(r"(\w+(?:<[^<>;{}]*>)?)\s*<<<(.*?)>>>\s*\(", re.DOTALL)
SHARED = re.compile(r"(?<!extern )__shared__\s+([\w:<>, ]+?)\s+(\w+)((?:\[[^\]]*\])*);")
DYNAMIC = re.compile(r"extern __shared__\s+([\w:]+)\s+(\w+)\[\];")


def as_cpp(text: str, numbers: Iterable[int]) -> str:
    """Return CUDA source with its launches and shared variables as C++; line numbers stay.

    Args:
        text: source.
        numbers: one number for each shared variable, unlike those of other files.
    """
    counted = iter(numbers)
    text = LAUNCH.sub(lambda m: f"emulated::launcher(&{m[1]}, {m[2]})(", text)
    text = DYNAMIC.sub(r"\1* const \2 = static_cast<\1*>(emulated::dynamic_shared());", text)
    return SHARED.sub(
        lambda m: f"auto& {m[2]} = emulated::shared<{m[1]}{m[3]}, {next(counted)}>();", text
    )


def compiled(command: Sequence[str | Path]) -> None:
    """Run a compiler; raise with what it says if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]}: {done.stderr[-4000:]}")


def build(
    folder: Path,
    only: str | None = None,
    changes: Sequence[tuple[str, str, str]] = (),
    flags: Sequence[str] = (),
) -> Path:
    """Return the path of a library built in an empty folder.

    Args:
        folder: folder for the rewritten sources and the library.
        only: stem of the one source to compile, beside that which explains errors; None: all.
        changes: file name, a text that occurs once in that file, and what replaces it.
        flags: more flags of the compiler.
    """
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources, ignore=shutil.ignore_patterns("cpu"))
    for name, old, new in changes:
        text = (sources / "cuda" / name).read_text()
        assert text.count(old) == 1, (name, old, text.count(old))
        (sources / "cuda" / name).write_text(text.replace(old, new))
    numbers = itertools.count()
    for path in sorted((sources / "cuda").iterdir()):
        rewritten = path.with_suffix(".cpp") if path.suffix == ".cu" else path
        rewritten.write_text(as_cpp(path.read_text(), numbers))
    command = [os.environ.get("CXX", "g++"), *FLAGS, *flags]
    files = [
        path
        for path in sorted(sources.glob("cuda/*.cpp"))
        if only is None or path.stem in (only, "device")
    ]
    include = f"-I{HERE / 'include'}"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [[*command, include, "-c", f, "-o", f.with_suffix(".o")] for f in files]
        list(pool.map(compiled, commands))
    library = folder / "libfastalign_emulated.so"
    compiled([*command, "-shared", *(f.with_suffix(".o") for f in files), "-o", library])
    return library


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
