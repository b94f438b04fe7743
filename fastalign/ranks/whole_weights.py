"""Whole weights of models that ranks share, to be written, sent, or sampled with."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from fastalign.ranks.parallel import entry_of, is_sharded, sharded_parts

T = TypeVar("T")


def whole_state(model: Any) -> dict[str, Tensor] | None:
    """Return every tensor whole, by name; None on the ranks that have none to write.

    A sharded model's are gathered into rank 0's host memory, for which all ranks must call this.
    """
    if is_sharded(model):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered: dict[str, Any] = get_model_state_dict(model, options=options)
        return gathered if dist.get_rank() == 0 else None
    if not writes(model):
        return None
    state: dict[str, Tensor] = model.state_dict()
    return state


def writes(model: Any) -> bool:
    """Return True on the rank that writes the model to disk."""
    return entry_of(model) is None or dist.get_rank() == 0


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, for which every rank must call this; return others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def with_whole_weights(model: Any, computation: Callable[[], T]) -> T:
    """Run a computation while every rank holds the whole model, on every rank.

    Within it the ranks may use the model unequally often, as in sampling.
    """
    entry = entry_of(model)
    if not isinstance(entry, FSDPModule):
        return computation()
    parts = sharded_parts(entry)
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        found: T = entry(computation)
        return found
    finally:
        for part in parts:
            part.set_reshard_after_forward(entry.reshard_after[part is entry], recurse=False)
            part.reshard()
