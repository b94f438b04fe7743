"""What one pass of the head reads, which gradients are wanted, and where they go.

Legend: N rows, V vocabulary, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops.head_tile import HeadTransform
from fastalign.ops.linear_products import accumulation_dtype, operand


@dataclass(frozen=True)
class HeadInputs:
    """The operands of one head pass."""

    hidden: Tensor  # (N, D), in the products' dtype
    weight: Tensor  # (V, D), in the products' dtype
    bias: Tensor | None  # (V,), in the accumulation dtype
    targets: Tensor  # (N,) int64, in range even where ignored
    ignored: Tensor  # (N,) bool
    transform: HeadTransform

    def rows(self, start: int, stop: int) -> "HeadInputs":
        """The same head on rows start..stop."""
        return HeadInputs(
            self.hidden[start:stop],
            self.weight,
            self.bias,
            self.targets[start:stop],
            self.ignored[start:stop],
            self.transform.rows(start, stop),
        )


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        """Whether any gradient is wanted."""
        return self.hidden or self.weight or self.bias

    @property
    def direction(self) -> bool:
        """Whether only the hidden states' is: then bracket @ W is all the backward needs."""
        return self.hidden and not self.weight and not self.bias

    @property
    def kept(self) -> bool:
        """Whether the brackets themselves are needed after the forward."""
        return self.weight or self.bias


@dataclass(frozen=True)
class Gradients:
    """Where `backward` writes (hidden) and adds (weight, bias); None where not wanted."""

    hidden: Tensor | None  # (N, D), any float dtype
    weight: Tensor | None  # (V, D), accumulation dtype
    bias: Tensor | None  # (V,), accumulation dtype

    def rows(self, start: int, stop: int) -> "Gradients":
        """The same places, with the hidden states' rows start..stop."""
        hidden = None if self.hidden is None else self.hidden[start:stop]
        return Gradients(hidden, self.weight, self.bias)


def head_inputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
) -> HeadInputs:
    """The operands of one call, rounded to `compute_dtype`."""
    ignored = targets == ignore_index
    return HeadInputs(
        operand(hidden, compute_dtype),
        operand(weight, compute_dtype),
        None if bias is None else bias.to(accumulation_dtype(compute_dtype)),
        targets.masked_fill(ignored, 0),
        ignored,
        HeadTransform(temperature, softcap, logit_scale),
    )
