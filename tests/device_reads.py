"""Counts what a GPU would be waited for, on a CPU: numbers of a device's tensors that Python reads.

A tensor is the device's if it is said to be (a model's parameters, a batch that was moved), or
computed from one that is. Lengths and bounds that stay on the host are free to read, so the count
is that of a GPU, where a read of a host tensor costs nothing either.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that return, or need, a number that only the device knows.
READING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# Methods that copy to the host without an operator where both are a CPU.
METHODS: dict[Callable[..., Any], str] = {
    Tensor.tolist: "tolist",
    Tensor.numpy: "numpy",
    Tensor.cpu: "cpu",
}


class DeviceReads(TorchDispatchMode):
    """Records each read of a device's tensor while it is active, in `reads`."""

    def __init__(self, device_tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.reads: list[str] = []
        self._storages: set[StorageWeakRef] = set()
        self._methods = _Methods(self)
        for tensor in device_tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """From now on the tensor is the device's."""
        self._storages.add(StorageWeakRef(tensor.untyped_storage()))

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is the device's."""
        return StorageWeakRef(tensor.untyped_storage()) in self._storages

    def __enter__(self) -> "DeviceReads":
        self._methods.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        ours = any(self.holds(value) for value in given)
        name = func._schema.name
        if ours and (name in READING or self._by_mask(name, args) or self._of_sizes(name, kwargs)):
            self.reads.append(name)
        results = func(*args, **kwargs)
        if ours:
            for value in tree_leaves(results):
                if isinstance(value, Tensor):
                    self.add(value)
        return results

    def _by_mask(self, name: str, args: tuple[Any, ...]) -> bool:
        """Whether a tensor is indexed by a device's mask, whose places have to be counted."""
        masks = args[1] if name in INDEXING else ()
        return any(m is not None and m.dtype == torch.bool and self.holds(m) for m in masks)

    def _of_sizes(self, name: str, kwargs: Mapping[str, Any]) -> bool:
        return name == "aten::repeat_interleave" and kwargs.get("output_size") is None


class _Methods(TorchFunctionMode):
    """The reads that are no operator on a CPU."""

    def __init__(self, reads: DeviceReads) -> None:
        self._reads = reads

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in METHODS and self._reads.holds(args[0]):
            self._reads.reads.append(METHODS[func])
        return func(*args, **(kwargs or {}))
