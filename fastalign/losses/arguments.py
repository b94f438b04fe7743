"""Checks shared by the losses."""

from torch import Tensor


def check_same_shape(**tensors: Tensor | None) -> None:
    """Checks that all tensors given have the shape of the first.

    Raises:
        ValueError: Naming the first that differs.
    """
    given = {name: value for name, value in tensors.items() if value is not None}
    first, expected = next((name, value.shape) for name, value in given.items())
    for name, value in given.items():
        if value.shape != expected:
            raise ValueError(
                f"{name}: expected {tuple(expected)} as {first} has, got {tuple(value.shape)}"
            )


def check_positive(**numbers: float | Tensor) -> None:
    """Checks that every number is above zero.

    Raises:
        ValueError: Naming the first that is not.
    """
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")


def check_label_smoothing(label_smoothing: float) -> None:
    """Checks 0 <= label_smoothing < 0.5: from one half on, the labels say nothing, or the opposite.

    Raises:
        ValueError: It is not.
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing: expected 0 <= label_smoothing < 0.5, got {label_smoothing}"
        )


def check_shares(shares: Tensor, of_pairs: Tensor) -> None:
    """Checks that there are three shares for each pair; `of_pairs` is (B,).

    Raises:
        ValueError: It is not so.
    """
    expected = (*of_pairs.shape, 3)
    if shares.shape != expected:
        raise ValueError(f"shares: expected {expected}, got {tuple(shares.shape)}")
