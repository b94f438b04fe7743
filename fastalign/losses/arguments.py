"""Checks of arguments, shared by the losses."""

from torch import Tensor


def check_same_shape(**tensors: Tensor | None) -> None:
    """Check that all tensors have the shape of the first; None is skipped.

    Raises:
        ValueError: if one differs; the message names it.
    """
    given = {name: value for name, value in tensors.items() if value is not None}
    first, expected = next((name, value.shape) for name, value in given.items())
    for name, value in given.items():
        if value.shape != expected:
            raise ValueError(
                f"{name}: expected {tuple(expected)} as {first} has, got {tuple(value.shape)}"
            )


def check_positive(**numbers: float | Tensor) -> None:
    """Check that every number is above zero.

    Raises:
        ValueError: if one is not; the message names it.
    """
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")


def check_label_smoothing(label_smoothing: float) -> None:
    """Check that 0 <= label_smoothing < 0.5.

    Labels of which half are wrong carry no information.

    Raises:
        ValueError: if it is outside that range.
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing: expected 0 <= label_smoothing < 0.5, got {label_smoothing}"
        )


def check_shares(shares: Tensor, per_pair: Tensor) -> None:
    """Check that there are three shares for each pair; `per_pair` is any tensor (B,).

    Raises:
        ValueError: if `shares` is not (B, 3).
    """
    expected = (*per_pair.shape, 3)
    if shares.shape != expected:
        raise ValueError(f"shares: expected {expected}, got {tuple(shares.shape)}")
