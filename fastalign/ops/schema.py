"""An operator's schema, written once: as the annotated fields of a NamedTuple."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int: "int",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
    Sequence[bool]: "bool[]",
}


def schema_of(arguments: type) -> str:
    """Return a NamedTuple's fields as arguments of a `torch.library` schema, in their order."""
    fields = arguments.__annotations__.items()
    return ", ".join(f"{SCHEMA_TYPES[annotation]} {name}" for name, annotation in fields)
