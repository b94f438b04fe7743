"""Schemas for `torch.library`, made from the NamedTuples that hold an operation's arguments."""

from collections.abc import Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    float: "float",
    float | None: "float?",
    str: "str",
    torch.dtype: "ScalarType",
    Sequence[bool]: "bool[]",
    Sequence[float]: "float[]",
}


def arguments_of(inputs: type[tuple[Any, ...]]) -> str:
    """Return the fields of a NamedTuple as the arguments of a schema: `Tensor x, float? cap`."""
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(inputs).items())
