"""What turns products into logits, and what one pass over a tile of them tells.

Legend: C tile rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadTransform:
    """From products to logits: z = softcap(logit_scale * (hidden @ W^T + bias)) / temperature.

    softcap(x) = c * tanh(x / c), as in Gemma 2 (arXiv 2408.00118, section 2); `logit_scale` is
    Cohere's multiplier, or one over Granite's divisor. `temperature` is None (1.0), or a tensor
    of one element or of one per row.
    """

    temperature: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def rows(self, start: int, stop: int) -> "HeadTransform":
        """The same transform for rows start..stop."""
        if self.temperature is None or self.temperature.numel() == 1:
            return self
        return HeadTransform(self.temperature[start:stop], self.softcap, self.logit_scale)

    def gain(self, like: Tensor) -> Tensor | float:
        """The factor from u (the tanh, or the raw product) to z: a float, or (C, 1)."""
        factor = self.logit_scale if self.softcap is None else self.softcap
        return self._over_temperature(factor, like)

    def slope(self, like: Tensor) -> Tensor | float:
        """The derivative of z by the product, less the tanh's own: a float, or (C, 1)."""
        return self._over_temperature(self.logit_scale, like)

    def _over_temperature(self, factor: float, like: Tensor) -> Tensor | float:
        if self.temperature is None:
            return factor
        return (factor / self.temperature.to(like.dtype)).reshape(-1, 1)


@dataclass(frozen=True)
class RowStatistics:
    """What one pass over the logits tells about each row, all (C,); the floats as accumulated.

    Ignored rows hold logprob 0, entropy 0, is_argmax False.
    """

    logprob: Tensor
    entropy: Tensor
    is_argmax: Tensor

    @staticmethod
    def empty(num_rows: int, device: torch.device) -> "RowStatistics":
        """Places for a kernel to write: float32."""

        def new_rows() -> Tensor:
            return torch.empty(num_rows, dtype=torch.float32, device=device)

        flags = torch.empty(num_rows, dtype=torch.bool, device=device)
        return RowStatistics(new_rows(), new_rows(), flags)


@dataclass(frozen=True)
class TileStatistics:
    """What the columns of one tile tell about each row, all (C,), as accumulated.

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
        """Places for a kernel to write."""

        def new_rows() -> Tensor:
            return torch.empty(num_rows, dtype=dtype, device=device)

        return TileStatistics(
            new_rows(), new_rows(), new_rows() if with_entropy else None, new_rows()
        )

    @staticmethod
    def of_no_columns(
        num_rows: int, device: torch.device, with_entropy: bool, dtype: torch.dtype
    ) -> "TileStatistics":
        """The statistics of rows without a column."""
        found = TileStatistics.empty(num_rows, device, with_entropy, dtype)
        for value in (found.total, found.weighted, found.target):
            if value is not None:
                value.zero_()
        found.maximum.fill_(-torch.inf)
        return found


@dataclass(frozen=True)
class SoftmaxStatistics:
    """A row's softmax over all columns, all (C,): log p = gain * (u - maximum) - log_total."""

    maximum: Tensor
    log_total: Tensor
    entropy: Tensor

    def rows(self, start: int, stop: int) -> "SoftmaxStatistics":
        """The same for rows start..stop."""
        return SoftmaxStatistics(
            self.maximum[start:stop], self.log_total[start:stop], self.entropy[start:stop]
        )
