"""Inputs, transforms and comparisons for the tests of `fused_linear_loss`."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.ops.backends import unusable_reason
from fastalign.ops.head.fused_linear_loss import LossFunction, TokenChunk, fused_linear_loss
from fastalign.ops.segments import segment_sum

ROWS, VOCABULARY, WIDTH = 21, 37, 8
IGNORED = (0, 6, 7, 20)
# The least for 37 float32 logits is 444 bytes (148 without scratch): one row at a time, a few rows
# kept, all rows kept.
BUDGETS = [444, 1_500, 3_000, None]
KERNELS = [
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("triton", torch.float32),
    ("native", torch.float32),
]
EAGER: dict[str, Any] = {"backend": "reference"}
GROUPS: dict[str, list[int] | None] = {
    "rows": None,
    "even": [0, 3, 6, 9, 12, 15, 18, 21],
    "uneven": [0, 0, 1, 4, 4, 4, 16, 18, 21, 21],
    "one": [0, 21],
}
TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "logit_scale": {"logit_scale": 0.25},
    "temperature": {"temperature": 0.7},
    "row_temperature": {"temperature": torch.linspace(0.4, 2.5, ROWS, dtype=torch.float64)},
    "everything": {
        "softcap": 2.0,
        "logit_scale": 3.0,
        "temperature": torch.linspace(0.4, 2.5, ROWS, dtype=torch.float64),
    },
}


def combined(
    kernels: Sequence[tuple[str, torch.dtype]], *choices: Iterable[Any]
) -> list[tuple[Any, ...]]:
    """Every combination of the choices for the first kernel, every pair of two for the others.

    That is, these have every combination but of the last choice, which takes turns.
    """
    exact, *others = kernels
    *first, last = [list(choice) for choice in choices]
    found = [(*exact, *combination) for combination in product(*first, last)]
    for kernel in others:
        for number, combination in enumerate(product(*first)):
            turn = number // len(first[-1]) + number
            found.append((*kernel, *combination, last[turn % len(last)]))
    return found


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


def group_loss(bounds: list[int] | None, rows: int = ROWS) -> LossFunction:
    """A loss that is not linear in the log-probs, and differs from group to group."""
    bounds = list(range(rows + 1)) if bounds is None else bounds
    num_groups = len(bounds) - 1

    def loss_fn(chunk: TokenChunk) -> tuple[Tensor, dict[str, Tensor]]:
        inside = bounds[chunk.group_start : chunk.group_stop + 1]
        assert (inside[0], inside[-1]) == (chunk.row_start, chunk.row_stop)
        sums = segment_sum(chunk.logprob, torch.tensor(inside) - chunk.row_start)
        share = torch.linspace(-1.0, 2.0, num_groups, dtype=sums.dtype)
        losses = torch.nn.functional.softplus(0.3 * sums + 2.0).square()
        metrics = {
            "logprob": chunk.logprob.sum(),
            "entropy": chunk.entropy.sum(),
            "correct": chunk.is_argmax.sum(),
            "targets": chunk.is_target.sum(),
        }
        return (losses * share[chunk.group_start : chunk.group_stop]).sum(), metrics

    return loss_fn


def outputs(
    values: list[Tensor], targets: Tensor, bounds: list[int] | None, **options: Any
) -> dict[str, Tensor]:
    """The loss, the metrics, and the gradient of each trained leaf."""
    hidden, weight, *bias = values
    loss, metrics = fused_linear_loss(
        hidden,
        weight,
        targets,
        bounds,
        group_loss(bounds, targets.numel()),
        bias=bias[0] if bias else None,
        **options,
    )
    trained = {n: v for n, v in zip("hwb", values, strict=False) if v.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return {"loss": loss.detach(), **metrics, **dict(zip(trained, gradients, strict=True))}


def assert_all_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], ulps: float = 64
) -> None:
    assert found.keys() == expected.keys()
    for name, one in found.items():
        other = expected[name]
        assert one.dtype == other.dtype, name
        epsilon = torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0
        slack = ulps * epsilon * max(1.0, largest(other))
        torch.testing.assert_close(one, other, rtol=0, atol=slack, msg=lambda m, n=name: f"{n} {m}")


def largest(value: Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0
