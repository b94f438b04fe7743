"""Choice of an operation's backend, and what the launchers of its backends share."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastalign.ops import native_library

BackendName = Literal["auto", "reference", "triton", "native"]
# Triton specialises a kernel for addresses and sizes that this divides.
ROW_ELEMENTS = 16
BACKENDS: tuple[str, ...] = get_args(BackendName)


def triton_interprets() -> bool:
    """Return True if Triton kernels run in Python; Triton reads it when a kernel is decorated."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unusable_reason(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Return why a backend cannot run on this device and dtype, and the remedy; None: it can."""
    if backend in ("reference", "torch"):
        return None
    if dtype == torch.float64:
        return "it computes in float32; backend='reference' computes in float64"
    if backend == "native":
        reason: str | None = native_library.unusable_reason(device_type)
        return reason
    assert backend in ("triton", "epilogue")
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'fastalign[triton]' (Linux)"
    if device_type == "cuda" or (device_type == "cpu" and triton_interprets()):
        return _without_tensor_memory_accelerator() if backend == "epilogue" else None
    if device_type == "cpu":
        return (
            "Triton compiles for GPUs only; move the tensors to one, or set TRITON_INTERPRET=1 "
            "before starting Python to run the kernels slowly in the interpreter"
        )
    return f"there are no kernels for device {device_type!r}"


@native_library.constant_in_graphs
def _without_tensor_memory_accelerator() -> str | None:
    """Return why the current GPU cannot load blocks by descriptors; None: it can, or there is none.

    Triton would replace these loads by loads of single elements.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0):
        return None
    major, minor = torch.cuda.get_device_capability()
    return (
        f"it needs compute capability 9.0, and {torch.cuda.get_device_name()} has {major}.{minor}; "
        "use 'auto'"
    )


def check_usable(operation: str, backend: str, device_type: str, dtype: torch.dtype) -> None:
    """Check that a named backend can run here.

    Raises:
        ValueError: if it cannot.
    """
    reason = unusable_reason(backend, device_type, dtype)
    if reason is not None:
        raise ValueError(
            f"backend: {operation} cannot run with {backend!r} on {device_type} in {dtype}: "
            f"{reason}"
        )


def choose_backend(
    operation: str, backend: str, device_type: str, dtype: torch.dtype
) -> Literal["reference", "triton", "native"]:
    """Return the backend to run: "auto" takes native, then (on a GPU) Triton, then the reference.

    Raises:
        ValueError: if the name is unknown, or a named backend cannot run here.
    """
    if backend not in BACKENDS:
        known = ", ".join(repr(name) for name in BACKENDS)
        raise ValueError(f"backend: expected one of {known}, got {backend!r}")
    if backend == "auto":
        if unusable_reason("native", device_type, dtype) is None:
            return "native"
        if device_type == "cuda" and unusable_reason("triton", device_type, dtype) is None:
            return "triton"
        return "reference"
    check_usable(operation, backend, device_type, dtype)
    return backend  # type: ignore[return-value]


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, on which kernels are launched."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def contiguous(value: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return a kernel's optional operand, contiguous and in its dtype."""
    return None if value is None else value.to(value.dtype if dtype is None else dtype).contiguous()


def unit_columns(matrix: Tensor) -> Tensor:
    """Return a matrix whose rows are each contiguous: kernels take a stride of rows only."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def padded_width(*matrices: Tensor) -> int:
    """Return V rounded up to a multiple of 16 if all matrices (..., V) have memory for it, else V.

    Triton makes 128-bit accesses only where 16 divides addresses, strides and a mask's columns.
    What lies behind a row is read and not used; of a matrix that is written it is overwritten.
    """
    width = matrices[0].shape[-1]
    padded = -(-width // ROW_ELEMENTS) * ROW_ELEMENTS
    for matrix in matrices:
        rows = zip(matrix.shape[:-1], matrix.stride()[:-1], strict=True)
        last = matrix.storage_offset() + sum((size - 1) * stride for size, stride in rows)
        end = (last + padded) * matrix.element_size()
        if matrix.stride(-2) % ROW_ELEMENTS or end > matrix.untyped_storage().nbytes():
            return width
    return padded


def gradient_rows(logits: Tensor, backend: str) -> Tensor:
    """Return an empty gradient (T, V): contiguous, or for Triton padded where the logits are."""
    num_rows, width = logits.shape
    padded = backend == "triton" and logits.stride(1) == 1 and logits.stride(0) % ROW_ELEMENTS == 0
    stride = -(-width // ROW_ELEMENTS) * ROW_ELEMENTS if padded else width
    return logits.new_empty(num_rows, stride)[:, :width]


def new_rows(count: int, num_rows: int, like: Tensor) -> list[Tensor]:
    """Return `count` uninitialised float32 tensors (num_rows,) for a kernel's results."""
    return [torch.empty(num_rows, dtype=torch.float32, device=like.device) for _ in range(count)]
