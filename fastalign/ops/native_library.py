"""The compiled libraries in `fastalign/_native`, loaded through the plain C ABI of `csrc/abi.h`.

They include no torch header: only addresses and sizes are passed, so one build serves every torch.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
ABI_VERSION = 7
FOLDER = Path(__file__).parents[1] / "_native"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# In the order of csrc/abi.h; -1 lets the library take the best that the processor has.
ISA_CODES = {"best": -1, "portable": 0, "avx2": 1, "avx512": 2}
_REBUILD = "reinstall with a C++ compiler there (pip install --force-reinstall --no-deps .)"
_REMEDY = {
    "cpu": "install a C++ compiler (g++ or clang++), then reinstall without FASTALIGN_NATIVE=0",
    "cuda": "install the CUDA toolkit (nvcc), then reinstall without FASTALIGN_NATIVE=0",
}


def library_path(device_type: str) -> Path:
    """Return the path of the library for `cpu` or `cuda`, which need not exist."""
    return FOLDER / f"libfastalign_{device_type}.so"


@lru_cache(maxsize=2)
def _load(device_type: str) -> ctypes.CDLL | str:
    """Return the library, or the reason why it cannot be used."""
    path = library_path(device_type)
    if not path.is_file():
        return f"the {device_type} library was not built; {_REMEDY[device_type]}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded ({error}); {_REBUILD}"
    library.fastalign_abi_version.restype = ctypes.c_int32
    found = library.fastalign_abi_version()
    if found != ABI_VERSION:
        return f"{path.name} has ABI version {found}, expected {ABI_VERSION}; {_REBUILD}"
    return library


def constant_in_graphs(function: F) -> F:
    """Mark a function as `torch.compiler.assume_constant_result` does.

    That loads the compiler, which takes a second, in every process that imports fastalign.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def unusable_reason(device_type: str) -> str | None:
    """Return why native code cannot run on a device type, and the remedy; None: it can.

    Of CUDA: on the current GPU, which is asked once. Where torch sees none, only whether there is a
    library.
    """
    if device_type not in _REMEDY:
        return f"there is no native code for device {device_type!r}"
    found = _load(device_type)
    if isinstance(found, str):
        return found
    if device_type == "cuda" and torch.cuda.is_available():
        return gpu_reason(torch.cuda.current_device())
    return None


@lru_cache
def gpu_reason(index: int) -> str | None:
    """Return why a GPU cannot run the CUDA library's kernels; None: it can."""
    library = load("cuda")
    library.fastalign_cuda_probe.restype = ctypes.c_int32
    with torch.cuda.device(index):
        code = library.fastalign_cuda_probe()
    if code == 0:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return (
        f"the cuda library has no kernel that {torch.cuda.get_device_name(index)} and its driver "
        f"run ({cuda_error(library, code)}); update the driver, or reinstall with "
        f"FASTALIGN_CUDA_ARCHITECTURES={major}{minor}"
    )


def cuda_error(library: ctypes.CDLL, code: int) -> str:
    """Return CUDA's name and explanation of an error that a function of a library returned."""
    texts = []
    for function in (library.fastalign_cuda_error_name, library.fastalign_cuda_error_string):
        function.restype = ctypes.c_char_p
        texts.append(function(ctypes.c_int32(code)).decode())
    return ": ".join(texts)


def load(device_type: str) -> ctypes.CDLL:
    """Return the library for a device type for which `unusable_reason` is None."""
    found = _load(device_type)
    assert not isinstance(found, str), found
    return found


def cpu_isas() -> list[str]:
    """Return the instruction sets that the CPU library has and this processor runs, best last."""
    library = load("cpu")
    library.fastalign_cpu_isa_usable.restype = ctypes.c_int32
    library.fastalign_cpu_isa_usable.argtypes = [ctypes.c_int32]
    return [
        name
        for name, code in ISA_CODES.items()
        if code >= 0 and library.fastalign_cpu_isa_usable(code)
    ]


def has_bfloat16_products() -> bool:
    """Return True if the CPU library has bfloat16 products for this processor's instructions."""
    return bool(load("cpu").fastalign_product_bf16_usable_cpu())


def has_amx() -> bool:
    """Return True if they are AMX's, the matrix unit of Intel's processors."""
    return bool(load("cpu").fastalign_product_bf16_usable_cpu() == 2)


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Return the address of the tensor's first element, or NULL."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


Argument = ctypes.c_int32 | ctypes.c_int64 | ctypes.c_float | ctypes.c_double | ctypes.c_void_p


class EntryPoint(NamedTuple):
    """A C function, its library, and the arguments that it ends with."""

    function: Any
    library: ctypes.CDLL
    ending: list[Argument]


def entry_point(name: str, device: torch.device) -> EntryPoint:
    """Return fastalign_<name>_<device type>, and what tells it where to run.

    That is the number of threads and the instruction set on a CPU, the current stream on a GPU.

    Raises:
        ValueError: if FASTALIGN_CPU_ISA is no name of an instruction set.
    """
    library = load(device.type)
    function = getattr(library, f"fastalign_{name}_{device.type}")
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        return EntryPoint(function, library, [ctypes.c_void_p(stream)])
    isa = os.environ.get("FASTALIGN_CPU_ISA", "best")
    if isa not in ISA_CODES:
        raise ValueError(f"FASTALIGN_CPU_ISA: expected one of {', '.join(ISA_CODES)}, got {isa!r}")
    threads, code = ctypes.c_int32(torch.get_num_threads()), ctypes.c_int32(ISA_CODES[isa])
    return EntryPoint(function, library, [threads, code])


def call(name: str, device: torch.device, arguments: Sequence[Argument | Tensor | None]) -> None:
    """Run fastalign_<name>_<device type>, with the arguments that `entry_point` adds.

    Args:
        name: name of the C function without prefix and device.
        device: device of the tensors.
        arguments: a tensor is passed as its address, None as NULL.

    Raises:
        ValueError: if FASTALIGN_CPU_ISA names an instruction set that this processor lacks.
        RuntimeError: if CUDA refuses the launch, with CUDA's error.
    """
    function, library, ending = entry_point(name, device)
    function.restype = ctypes.c_int32
    passed = [address(x) if x is None or isinstance(x, Tensor) else x for x in arguments]
    code = function(*passed, *ending)
    if code == 1:
        raise ValueError("FASTALIGN_CPU_ISA: this processor or this build does not have it")
    if code < 0:
        raise RuntimeError(f"{name}: {cuda_error(library, code)}")
    assert code == 0, f"{name}: native code returned {code}"
