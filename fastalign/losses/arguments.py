"""Checks of arguments, shared by the losses."""

import math

from torch import Tensor


def check_same_shape(**tensors: Tensor | None) -> None:
    """Raise ValueError, which names one, unless all tensors (None is skipped) have one shape."""
    given = {name: value for name, value in tensors.items() if value is not None}
    first, expected = next((name, value.shape) for name, value in given.items())
    for name, value in given.items():
        if value.shape != expected:
            raise ValueError(
                f"{name}: expected {tuple(expected)} as {first} has, got {tuple(value.shape)}"
            )


def check_positive(**numbers: float | Tensor) -> None:
    """Raise ValueError, which names one, unless every number is above zero."""
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")


def check_not_negative(**numbers: float) -> None:
    """Raise ValueError, which names one, unless every number is at least zero, and finite."""
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number not below 0, got {value}")


def check_range(**bounds: float) -> None:
    """Raise ValueError, which names both, unless 0 <= the first number < the second."""
    (low_name, low), (high_name, high) = bounds.items()
    if not 0 <= low < high:
        raise ValueError(
            f"{low_name}, {high_name}: expected 0 <= {low_name} < {high_name}, got {low} and {high}"
        )


def check_label_smoothing(label_smoothing: float) -> None:
    """Raise ValueError unless 0 <= label_smoothing < 0.5; at one half labels say nothing."""
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing: expected 0 <= label_smoothing < 0.5, got {label_smoothing}"
        )


def check_shares(shares: Tensor, per_pair: Tensor) -> None:
    """Raise ValueError unless `shares` is (B, 3), three for each pair; `per_pair` is any (B,)."""
    expected = (*per_pair.shape, 3)
    if shares.shape != expected:
        raise ValueError(f"shares: expected {expected}, got {tuple(shares.shape)}")
