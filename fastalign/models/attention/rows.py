"""Gather rows of a packed tensor for attention, some of them several times, with a gradient.

Legend: T packed tokens, M gathered places, H heads, d head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Concatenate the integers of `[start, start + length)` for each pair; on the host."""
    ends = lengths.cumsum(0)
    total = int(ends[-1])
    first = starts - (ends - lengths)
    return torch.repeat_interleave(first, lengths, output_size=total) + torch.arange(total)


@dataclass(frozen=True)
class Gather:
    """The token at each gathered place, and the places of each token's copies.

    A prompt's token is copied once for each response. Its gradient is the sum over its copies,
    added copy by copy in float32: the order is fixed, so the sum is deterministic on a GPU too.

    Attributes:
        index: (M,) int64, the token at each place; padding places repeat some token.
        places: (T,) int64, the place of each token's first copy.
        more: for each further copy number, the tokens that have such a copy, and its places.
    """

    index: Tensor
    places: Tensor
    more: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def from_copies(cls, index: Tensor, copy: Tensor, device: torch.device) -> Gather:
        """Make a gather from host tensors (M,): each place's token and copy number.

        Copies are numbered from 0, which every token has to have; padding has the number -1.
        """
        parts = []
        for number in range(int(copy.max()) + 1):
            places = torch.nonzero(copy == number)[:, 0]
            tokens = index[places]
            order = tokens.argsort()
            parts.append((tokens[order], places[order]))
        tokens, places = parts[0]
        assert torch.equal(tokens, torch.arange(len(tokens))), "every token has a first copy"
        return cls(
            index.to(device, non_blocking=True),
            places.to(device, non_blocking=True),
            tuple(
                (t.to(device, non_blocking=True), p.to(device, non_blocking=True))
                for t, p in parts[1:]
            ),
        )

    def __call__(self, rows: Tensor) -> Tensor:
        """Gather rows (T, H, d) to places (M, H, d)."""
        gathered: Tensor = _Gather.apply(rows, self)  # type: ignore[no-untyped-call]
        return gathered

    def sum_copies(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the rows (T, H, d), given that of the places (M, H, d)."""
        first = gradient.index_select(0, self.places)
        if not self.more:
            return first
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        total = first.to(wide)
        for tokens, places in self.more:  # each token occurs once: no two additions collide
            total.index_add_(0, tokens, gradient.index_select(0, places).to(wide))
        return total.to(gradient.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        return rows.index_select(0, gather.index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.gather.sum_copies(gradients[0]), None
