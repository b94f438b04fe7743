"""What one pass over two heads' tiles tells, and the gradients that come from upstream.

Legend: C tile rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PairStatistics(NamedTuple):
    """What one pass tells about each row, all (C,), as accumulated; zeros where ignored."""

    logprob: Tensor
    reference_logprob: Tensor
    entropy: Tensor
    kl: Tensor

    @staticmethod
    def empty(num_rows: int, like: Tensor) -> "PairStatistics":
        """Places to write, in the dtype and on the device of `like`."""
        return PairStatistics(*(like.new_empty(num_rows) for _ in range(4)))

    @staticmethod
    def joined(parts: Sequence["PairStatistics"], like: Tensor) -> "PairStatistics":
        """The rows of all the parts."""
        if not parts:
            return PairStatistics.empty(0, like)
        return PairStatistics(*(torch.cat(values) for values in zip(*parts, strict=True)))


class Upstream(NamedTuple):
    """The gradients of a loss by a row's log-prob, entropy and KL, all (C,)."""

    logprob: Tensor
    entropy: Tensor
    kl: Tensor

    def rows(self, start: int, stop: int) -> "Upstream":
        """Those of rows start..stop."""
        return Upstream(*(values[start:stop] for values in self))
