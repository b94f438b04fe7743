"""Inputs and comparisons for the tests of `linear_kl`."""

from typing import Any

import torch
from torch import Tensor

from fastalign.ops import linear_kl
from tests.ops.head.linear_logprob.linear_logprob_cases import ROWS, VOCABULARY

REFERENCE_WIDTH = 5
# The least for twice 37 float32 logits is 888 bytes (296 without scratch): one row at a time, some
# rows kept, all rows kept.
BUDGETS = [888, 5_000, None]
RESULTS = ("logprob", "reference_logprob", "entropy", "kl")
DIRECTIONS = ["reverse", "forward"]


def reference_head(dtype: torch.dtype, rows: int = ROWS) -> list[Tensor]:
    """Hidden, weight and bias of the reference, whose hidden states have another width."""
    generator = torch.Generator().manual_seed(4)
    shapes = ((rows, REFERENCE_WIDTH), (VOCABULARY, REFERENCE_WIDTH), (VOCABULARY,))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def outputs(
    values: list[Tensor], reference: list[Tensor], targets: Tensor, through: str, **options: Any
) -> list[Tensor]:
    """The four results, and the gradient of each trained leaf through what `through` names."""
    hidden, weight, *bias = values
    other_hidden, other_weight, *other_bias = reference
    found = linear_kl(
        hidden,
        weight,
        other_hidden,
        other_weight,
        targets,
        bias=bias[0] if bias else None,
        reference_bias=other_bias[0] if other_bias else None,
        **options,
    )
    coefficients = torch.linspace(-1.0, 2.0, 3 * targets.numel(), dtype=found.kl.dtype)
    upstream = dict(zip(("logprob", "kl", "entropy"), coefficients.view(3, -1), strict=True))
    total = sum((getattr(found, name) * upstream[name]).sum() for name in through.split("+"))
    trained = [value for value in values if value.requires_grad]
    return [*(value.detach() for value in found), *torch.autograd.grad(total, trained)]
