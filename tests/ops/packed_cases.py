"""Packed responses for the tests of `kl_penalty` and `gae`."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from fastalign.ops.backends import unusable_reason

LENGTHS = [[1], [5], [0, 3, 0, 1, 17, 0], [64, 65, 200], [0], []]
BACKENDS = ["reference", "triton", "native"]


def require(backend: str, device_type: str = "cpu") -> None:
    """Skips a test whose backend cannot run here."""
    reason = unusable_reason(backend, device_type, torch.float32)
    if reason is not None:
        pytest.skip(reason)


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)))


def normal(size: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def order_of(lengths: list[int]) -> tuple[list[int], Tensor]:
    """The responses reversed: their lengths, and the index of each token."""
    tokens = torch.arange(sum(lengths)).split(lengths)
    return lengths[::-1], torch.cat(tokens[::-1])


def poison_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes torch.empty return NaNs."""
    empty = torch.empty

    def poisoned(*shape: object, **options: object) -> Tensor:
        value = empty(*shape, **options)  # type: ignore[call-overload]
        return value.fill_(torch.nan) if value.is_floating_point() else value

    monkeypatch.setattr(torch, "empty", poisoned)
