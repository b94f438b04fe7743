"""The settings of a run's forwards (device, dtype, packing, ranks), and the memory they take."""

import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, get_args

import torch

from fastalign.choices import AttentionChoice, Packing
from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.world import ALONE, World


def find_device(name: str, argument: str = "device") -> torch.device:
    """Return the device called `name`; `auto` is a GPU if there is one, else the CPU.

    Raises:
        ValueError: if the device cannot be used; the message begins with `argument`.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"{argument}: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{argument}: {name} was asked for, but torch sees no GPU here")
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an allocation failed; PyTorch on a CPU raises a plain RuntimeError for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)


@contextmanager
def memory_used_in(what: str) -> Iterator[None]:
    """Add a note of what was being done to an error of memory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            error.add_note(what)
        raise


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: PyTorch's on a GPU, otherwise the process's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def require_finite(values: torch.Tensor, what: str) -> None:
    """Raise ValueError, which begins with `what`, if a computed number is NaN or infinite."""
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{what}: {bad} of {values.numel()} are not finite; the model computes NaN or infinity "
            "(its weights, its configuration or the dtype of its products are at fault)"
        )


PACKINGS: tuple[Packing, ...] = get_args(Packing)
CPU_ALLOCATOR = "DefaultCPUAllocator"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Compute:
    """Settings of forwards: device, dtype, packing, limits, and the ranks that share them.

    Attributes:
        device: device of the batches and of the models that are not offloaded.
        dtype: dtype of the matrix products. Below float32 they run under autocast, whatever the
            dtype of the weights; float32: in the dtype of the weights, without autocast.
        packing: layout of a batch. `shared_prefix` lays each prompt once and all its responses in
            one row, under shared-prefix attention; `packed` repeats the prompt before each
            response; `padded` runs one right-padded sequence per response, under the model's own
            attention.
        attention: implementation of shared-prefix attention; `auto` takes the first usable one.
        tokens_per_batch: upper limit of the packed tokens of one forward.
        max_buffer_bytes: upper limit of the bytes of logits held at a time; None: the default of
            the operation.
        world: the ranks that share the work.
        parallel: how the ranks share the models.

    Raises:
        ValueError: if `packing` is unknown.
    """

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    packing: Packing = "shared_prefix"
    attention: AttentionChoice = "auto"
    tokens_per_batch: int = 16384
    max_buffer_bytes: int | None = None
    world: World = ALONE
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.packing not in PACKINGS:
            raise ValueError(
                f"packing: expected one of {', '.join(PACKINGS)}, got {self.packing!r}"
            )

    @property
    def share_prompts(self) -> bool:
        """Argument of `pack`: True unless each response has its own copy of the prompt."""
        return self.packing != "packed"

    @property
    def syncs_each_batch(self) -> bool:
        """True if gradients are reduced over ranks after each batch, not only after the last."""
        return self.parallel.strategy == "fsdp" and not self.parallel.no_sync

    @property
    def product_dtype(self) -> torch.dtype | None:
        """Dtype of a head's products (`compute_dtype`); None in float32: that of the operands."""
        return None if self.dtype == torch.float32 else self.dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """Return an autocast context to `dtype`; in float32, one that changes nothing."""
        if self.product_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.product_dtype)


ON_CPU = Compute()
