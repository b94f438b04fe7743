"""Checks of tensors over packed responses, shared by `kl_penalty` and `gae`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastalign.ops.segments import check_bounds


def check_packed(
    bounds: Tensor, tokens: Mapping[str, Tensor | None], responses: Mapping[str, Tensor | None]
) -> None:
    """Check bounds (R + 1,), floating tensors (N,) of tokens, and (R,) of responses.

    The first of `tokens` must be given; the others must have its length and device.

    Raises:
        ValueError: if one has a wrong shape, dtype or device; the message names it.
    """
    first, like = next(iter(tokens.items()))
    assert like is not None
    if like.ndim != 1 or not like.is_floating_point():
        raise ValueError(f"{first}: expected floating (N,), got {like.dtype} {tuple(like.shape)}")
    check_bounds(bounds, like.shape[0])
    sizes = [(name, value, like.shape[0]) for name, value in tokens.items()]
    sizes += [(name, value, bounds.shape[0] - 1) for name, value in responses.items()]
    for name, value, size in sizes:
        if value is not None and (value.shape != (size,) or not value.is_floating_point()):
            raise ValueError(
                f"{name}: expected floating ({size},), got {value.dtype} {tuple(value.shape)}"
            )
    for name, value in {**tokens, **responses, "bounds": bounds}.items():
        check_device(name, value, first, like)


def check_device(name: str, value: Tensor | None, first: str, like: Tensor) -> None:
    """Check that a tensor is on the device of another.

    Raises:
        ValueError: if it is not.
    """
    if value is not None and value.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} as {first} is, got {value.device}")


def compute_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype of the computation: float64 for float64, else float32."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32
