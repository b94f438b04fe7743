"""Outputs that a backward computes again from what it keeps anyway, in place of keeping them.

The output of a norm or of a gated activation is the input of the products that follow, which keep
it for the gradients of their weights. It costs one pass over memory to make again. Selective
recomputation in the sense of Korthikanti et al. (arXiv 2205.05198, section 5), of what costs least.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

_active: ContextVar[bool] = ContextVar("outputs_are_recomputed", default=False)


class _Output:
    """An output of a cheap operation, for all that keep it for their backward.

    Attributes:
        compute: makes it again.
        num_waiting: how many have kept it and have not read it.
    """

    def __init__(self, output: Tensor, compute: Callable[[], Tensor]):
        self.compute = compute
        self.num_waiting = 0
        self._output, self._version = weakref.ref(output), output._version
        self._again: Tensor | None = None

    def is_unchanged(self) -> bool:
        """Return whether the output is still there, with the values that it was computed with."""
        output = self._output()
        return output is not None and output._version == self._version

    def read(self) -> Tensor:
        """Return it, computed once for all that keep it and read it in one backward."""
        found = self.compute() if self._again is None else self._again
        self.num_waiting -= 1
        self._again = found if self.num_waiting > 0 else None
        return found


class _Kept(NamedTuple):
    """A view of an output, as one operation keeps it."""

    output: _Output
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


# By the address of an output's storage. What keeps an entry may outlive that storage, whose address
# may come again: `is_unchanged` is False then, since its output is gone.
_outputs: weakref.WeakValueDictionary[int, _Output] = weakref.WeakValueDictionary()


@contextmanager
def recomputed_outputs() -> Iterator[None]:
    """Have operations in the context, whose gradients are recorded, keep no output that is cheap.

    Inside a checkpoint, whose tensors are all computed again, nothing changes.
    """
    if not torch.is_grad_enabled():
        yield
        return
    token = _active.set(True)
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _active.reset(token)


def recompute(output: Tensor, compute: Callable[[], Tensor]) -> None:
    """Have a backward call `compute` for an output, in place of keeping it.

    Only in the context of `recomputed_outputs`. `compute` returns the same numbers with the same
    strides, without a gradient, and holds only tensors that the operation's own backward holds.
    """
    if _active.get() and output.requires_grad:
        output._fastalign_output = entry = _Output(output, compute)  # type: ignore[attr-defined]
        _outputs[output.untyped_storage()._cdata] = entry


def _pack(tensor: Tensor) -> Any:
    has_storage = tensor.is_cpu and tensor.layout == torch.strided
    output = _outputs.get(tensor.untyped_storage()._cdata) if has_storage else None
    if output is None or not output.is_unchanged():
        return tensor
    output.num_waiting += 1
    return _Kept(output, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: Any) -> Tensor:
    if not isinstance(kept, _Kept):
        assert isinstance(kept, Tensor)
        return kept
    return kept.output.read().as_strided(kept.size, kept.stride, kept.offset)
