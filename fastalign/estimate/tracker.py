"""The memory of computations on tensors without data: what is alive, and at its peak.

PyTorch's `MemTracker` also keeps statistics of each module, and goes through all modules after each
operation: the estimate of a model with adapters, whose layers have many modules, took the square of
its depth. Here an operation costs as much in a deep model as in a shallow one.
"""

import weakref
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PARAMETER, BUFFER, GRADIENT, OTHER = "parameter", "buffer", "gradient", "other"
CUDA_BLOCK = 512  # bytes to which the CUDA allocator rounds up


class _Counted(NamedTuple):
    kind: str
    size: int
    storage: Any  # a weak reference, whose end takes the size off


class PeakTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow the storages that are created in the context on a device, beside those of a model.

    Args:
        model: its parameters, buffers and gradients are counted as such.
        device: what lies elsewhere is not counted.

    Attributes:
        alive: bytes by kind.
        peak: bytes by kind when their sum was largest.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device.type
        self.alive = dict.fromkeys((PARAMETER, BUFFER, GRADIENT, OTHER), 0)
        self.peak = dict(self.alive)
        self._counted: dict[int, _Counted] = {}  # by the address of a storage's Python object
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._hooks: list[Any] = []
        for parameter in model.parameters():
            self._see(parameter, PARAMETER)
            if parameter.grad is not None:
                self._see(parameter.grad, GRADIENT)
        for buffer in model.buffers():
            self._see(buffer, BUFFER)
        self._update_peak()

    def __enter__(self) -> "PeakTracker":
        """Begin to follow."""
        trained: list[Any] = self._trained
        for parameter in trained:  # before it is accumulated, and the sum
            self._hooks.append(parameter.register_hook(self._see_gradient))
            after = parameter.register_post_accumulate_grad_hook(
                lambda each: self._see(each.grad, GRADIENT)
            )
            self._hooks.append(after)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """End; the peak stays."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # a mode's own signature
        """Run an operation, and count the storages of its results."""
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self._see(each)
        self._update_peak()
        return found

    def _see_gradient(self, gradient: Tensor) -> None:
        self._see(gradient, GRADIENT)

    def _see(self, tensor: Any, kind: str | None = None) -> None:
        """Count a tensor's storage once; one that was counted becomes one of `kind`, if given."""
        if tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        before = self._counted.get(key)
        if before is None:
            size = _allocated(storage.nbytes(), self._device)
            alive = weakref.ref(storage, partial(self._forget, key))
            self._counted[key] = _Counted(kind or OTHER, size, alive)
            self.alive[kind or OTHER] += size
        elif kind is not None:
            self._counted[key] = before._replace(kind=kind)
            self.alive[before.kind] -= before.size
            self.alive[kind] += before.size

    def _forget(self, key: int, _: Any) -> None:
        gone = self._counted.pop(key)
        self.alive[gone.kind] -= gone.size

    def _update_peak(self) -> None:
        if sum(self.alive.values()) > sum(self.peak.values()):
            self.peak = dict(self.alive)


def _allocated(size: int, device: str) -> int:
    return -(-size // CUDA_BLOCK) * CUDA_BLOCK if device == "cuda" else size
