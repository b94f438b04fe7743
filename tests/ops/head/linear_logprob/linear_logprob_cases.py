"""Inputs, transforms and comparisons for the tests of `linear_logprob`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.ops.backends import unusable_reason
from fastalign.ops.head.linear_logprob import linear_logprob

ROWS, VOCABULARY, WIDTH = 21, 37, 8
IGNORED = (0, 6, 7, 20)
# The least for 37 float32 logits is 444 bytes (148 without scratch): one row at a time, a few rows
# kept, all rows kept.
BUDGETS = [444, 3_000, None]
KERNELS = [
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("triton", torch.float32),
    ("native", torch.float32),
]
EAGER: dict[str, Any] = {"backend": "reference"}
TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "logit_scale": {"logit_scale": 0.25},
    "temperature": {"temperature": 0.7},
    "row_temperature": {"temperature": torch.linspace(0.4, 2.5, ROWS, dtype=torch.float64)},
    "one_element_temperature": {"temperature": torch.tensor(1.6)},
    "everything": {
        "softcap": 2.0,
        "logit_scale": 3.0,
        "temperature": torch.linspace(0.4, 2.5, ROWS, dtype=torch.float64),
    },
}


def skip_unusable(backend: str, dtype: torch.dtype) -> None:
    """Skips the test where the backend cannot run."""
    reason = None if backend == "torch" else unusable_reason(backend, "cpu", dtype)
    if reason is not None:
        pytest.skip(reason)


def leaves(
    dtype: torch.dtype, rows: int = ROWS, weight_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Hidden, weight and bias, all of which are trained."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((rows, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    dtypes = (dtype, weight_dtype or dtype, weight_dtype or dtype)
    return [value.to(d).requires_grad_() for value, d in zip(made, dtypes, strict=True)]


def some_targets(rows: int = ROWS, ignored: tuple[int, ...] = IGNORED) -> Tensor:
    targets = torch.arange(rows) * 5 % VOCABULARY
    targets[[row for row in ignored if row < rows]] = -100
    return targets


def clones(values: list[Tensor]) -> list[Tensor]:
    return [value.detach().clone().requires_grad_(value.requires_grad) for value in values]


def outputs(values: list[Tensor], targets: Tensor, through: str, **options: Any) -> list[Tensor]:
    """Log-prob, entropy, and the gradient of each trained leaf through what `through` names."""
    hidden, weight, *bias = values
    logprob, entropy = linear_logprob(
        hidden, weight, targets, bias=bias[0] if bias else None, return_entropy=True, **options
    )
    coefficients = torch.linspace(-1.0, 2.0, 2 * targets.numel(), dtype=logprob.dtype)
    upstream = dict(zip(("logprob", "entropy"), coefficients.chunk(2), strict=True))
    read = {"logprob": logprob, "entropy": entropy}
    total = sum((read[name] * upstream[name]).sum() for name in through.split("+"))
    trained = [value for value in values if value.requires_grad]
    return [logprob.detach(), entropy.detach(), *torch.autograd.grad(total, trained)]


def assert_all_close(found: list[Tensor], expected: list[Tensor], ulps: float = 64) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype, index
        slack = ulps * torch.finfo(one.dtype).eps * max(1.0, largest(other))
        torch.testing.assert_close(one, other, rtol=0, atol=slack, msg=lambda m, i=index: f"{i}{m}")


def largest(value: Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0
