"""Records of a pass over a tile: the transform, the tile, upstream gradients and statistics.

Legend: C tile rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadTransform:
    """Transform of products x into logits z = softcap(logit_scale * x) / temperature.

    softcap(x) = c * tanh(x / c), as in Gemma 2 (arXiv 2408.00118, section 2); `logit_scale` is
    Cohere's multiplier, or one over Granite's divisor. `temperature` is None (1.0), or a tensor
    of one element or of one per row.
    """

    temperature: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def rows(self, start: int, stop: int) -> "HeadTransform":
        """Return the same transform for rows start..stop."""
        if self.temperature is None or self.temperature.numel() == 1:
            return self
        return HeadTransform(self.temperature[start:stop], self.softcap, self.logit_scale)

    def gain(self, like: Tensor) -> Tensor | float:
        """Return the factor from u (the tanh, or the raw product) to z: a float, or (C, 1)."""
        factor = self.logit_scale if self.softcap is None else self.softcap
        return self._over_temperature(factor, like)

    def slope(self, like: Tensor) -> Tensor | float:
        """Return the derivative of z by the product, less the tanh's own: a float, or (C, 1)."""
        return self._over_temperature(self.logit_scale, like)

    def _over_temperature(self, factor: float, like: Tensor) -> Tensor | float:
        if self.temperature is None:
            return factor
        return (factor / self.temperature.to(like.dtype)).reshape(-1, 1)


@dataclass(frozen=True)
class Tile:
    """A tile of products, and what is needed to read its rows.

    Attributes:
        products: (C, V) products plus bias, in the accumulation dtype; of two heads (2, C, V).
        targets: (C,) int64 columns, in range even where ignored.
        ignored: (C,) bool; statistics and gradients of these rows are 0.
        transform: transform of the products into logits.
    """

    products: Tensor
    targets: Tensor
    ignored: Tensor
    transform: HeadTransform

    def rows(self, start: int, stop: int) -> "Tile":
        """Return the same tile's rows start..stop."""
        return Tile(
            self.products[..., start:stop, :],
            self.targets[start:stop],
            self.ignored[start:stop],
            self.transform.rows(start, stop),
        )


class Upstream(NamedTuple):
    """Gradients of a loss by log-probs and entropies, both (C,); None: ones, and zeros."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None

    def columns(self, start: int, stop: int) -> "Upstream":
        """Return those of rows start..stop, as columns (stop - start, 1)."""
        return Upstream(*(None if rows is None else rows[start:stop, None] for rows in self))


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of each row, all (C,); the floats in the accumulation dtype.

    Ignored rows hold logprob 0, entropy 0, is_argmax False.

    Attributes:
        logprob: log-probs of the targets.
        entropy: entropies in nats.
        is_argmax: True where no logit is larger than the target's.
        softmax: softmax of the row where ranks share the vocabulary, else None.
    """

    logprob: Tensor
    entropy: Tensor
    is_argmax: Tensor
    softmax: "SoftmaxStatistics | None" = None

    @staticmethod
    def empty(num_rows: int, device: torch.device) -> "RowStatistics":
        """Return empty float32 statistics, for a kernel to write."""

        def new_rows() -> Tensor:
            return torch.empty(num_rows, dtype=torch.float32, device=device)

        flags = torch.empty(num_rows, dtype=torch.bool, device=device)
        return RowStatistics(new_rows(), new_rows(), flags)

    @staticmethod
    def joined(parts: Sequence["RowStatistics"], like: Tensor) -> "RowStatistics":
        """Return the rows of all parts; of none, empty ones in the dtype of `like`."""

        def cat(values: Sequence[Tensor]) -> Tensor:
            # never the same tensor twice: an operator's outputs may not be aliases
            return torch.cat(list(values)) if values else like.new_empty(0)

        softmaxes = [part.softmax for part in parts if part.softmax is not None]
        columns = zip(*softmaxes, strict=True) if softmaxes else ()
        return RowStatistics(
            cat([part.logprob for part in parts]),
            cat([part.entropy for part in parts]),
            cat([part.is_argmax for part in parts]) if parts else like.new_empty(0).bool(),
            SoftmaxStatistics(*(torch.cat(values) for values in columns)) if softmaxes else None,
        )


@dataclass(frozen=True)
class TileStatistics:
    """Statistics of each row over the columns of one tile, all (C,), in the accumulation dtype.

    z = gain * u, see `HeadTransform`. A row without columns, or with nothing but -inf, has maximum
    -inf and sums 0; an ignored row holds zeros.
    """

    maximum: Tensor  # of u
    total: Tensor  # sum of exp(z - max z)
    weighted: Tensor | None  # sum of (z - max z) exp(z - max z); None where not asked for
    target: Tensor  # u at the target; 0 where that is not among these columns

    @staticmethod
    def empty(
        num_rows: int, device: torch.device, with_entropy: bool, dtype: torch.dtype = torch.float32
    ) -> "TileStatistics":
        """Return empty statistics, for a kernel to write."""

        def new_rows() -> Tensor:
            return torch.empty(num_rows, dtype=dtype, device=device)

        return TileStatistics(
            new_rows(), new_rows(), new_rows() if with_entropy else None, new_rows()
        )

    @staticmethod
    def of_no_columns(
        num_rows: int, device: torch.device, with_entropy: bool, dtype: torch.dtype
    ) -> "TileStatistics":
        """Return the statistics of rows without a column."""
        found = TileStatistics.empty(num_rows, device, with_entropy, dtype)
        for value in (found.total, found.weighted, found.target):
            if value is not None:
                value.zero_()
        found.maximum.fill_(-torch.inf)
        return found


class SoftmaxStatistics(NamedTuple):
    """A row's softmax over all columns, all (C,): log p = gain * (u - maximum) - log_total."""

    maximum: Tensor
    log_total: Tensor
    entropy: Tensor

    def rows(self, start: int, stop: int) -> "SoftmaxStatistics":
        """Return the same for rows start..stop."""
        return SoftmaxStatistics(*(values[start:stop] for values in self))
