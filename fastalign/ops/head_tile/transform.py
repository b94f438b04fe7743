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
