"""Records of a pass over two heads' tiles: statistics and upstream gradients.

Legend: C tile rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PairStatistics(NamedTuple):
    """Statistics of each row, all (C,), in the accumulation dtype; zeros where ignored."""

    logprob: Tensor
    reference_logprob: Tensor
    entropy: Tensor
    kl: Tensor

    @staticmethod
    def empty(num_rows: int, like: Tensor) -> "PairStatistics":
        """Return empty statistics, in the dtype and on the device of `like`."""
        return PairStatistics(*(like.new_empty(num_rows) for _ in range(4)))

    @staticmethod
    def joined(parts: Sequence["PairStatistics"], like: Tensor) -> "PairStatistics":
        """Return the rows of all parts."""
        if not parts:
            return PairStatistics.empty(0, like)
        return PairStatistics(*(torch.cat(values) for values in zip(*parts, strict=True)))


class PairUpstream(NamedTuple):
    """Gradients of a loss by a row's log-prob, entropy and KL, all (C,)."""

    logprob: Tensor
    entropy: Tensor
    kl: Tensor

    def rows(self, start: int, stop: int) -> "PairUpstream":
        """Return those of rows start..stop."""
        return PairUpstream(*(values[start:stop] for values in self))
