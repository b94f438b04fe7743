"""Columns of target tokens, for the implementations in PyTorch.

Legend: T rows, V columns (vocabulary).
"""

import torch
from torch import Tensor


def target_columns(
    targets: Tensor,  # (T,) int64
    ignored: Tensor,  # (T,) bool
    num_columns: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # (T, 1) int64, and (T, 1) of `dtype`
    """Return a column to gather for each row, and a factor of its log-prob: 1, or NaN.

    The factor is NaN for a target that is not ignored and lies outside 0..V - 1. A product with it
    makes the log-prob and the whole row of its gradient NaN, where a number that is read from
    another place would look like a log-prob.
    """
    inside = (targets >= 0) & (targets < num_columns)
    factor = torch.ones(targets.shape, dtype=dtype, device=targets.device)
    factor.masked_fill_(~(inside | ignored), torch.nan)
    return targets.masked_fill(~inside, 0)[:, None], factor[:, None]
