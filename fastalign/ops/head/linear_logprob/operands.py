"""What one pass of the head reads, which gradients are wanted, and where they go.

Legend: N rows, V vocabulary, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops.head.head_tile import HeadTransform
from fastalign.ops.head.products import accumulation_dtype, add_product, operand, project


@dataclass(frozen=True)
class HeadInputs:
    """The operands of one head pass."""

    hidden: Tensor  # (N, D), in the products' dtype
    weight: Tensor  # (V, D), in the products' dtype
    bias: Tensor | None  # (V,), in the accumulation dtype
    targets: Tensor  # (N,) int64, in range even where ignored
    ignored: Tensor  # (N,) bool
    transform: HeadTransform
    # Of an adapted head, both or none, in the products' dtype; logits get their product too.
    lora_hidden: Tensor | None = None  # (N, r)
    lora_weight: Tensor | None = None  # (V, r)

    def rows(self, start: int, stop: int) -> "HeadInputs":
        """The same head on rows start..stop."""
        return HeadInputs(
            self.hidden[start:stop],
            self.weight,
            self.bias,
            self.targets[start:stop],
            self.ignored[start:stop],
            self.transform.rows(start, stop),
            None if self.lora_hidden is None else self.lora_hidden[start:stop],
            self.lora_weight,
        )

    def project(self, out: Tensor) -> None:
        """Writes the products and bias, (N, V), into `out`."""
        project(self.hidden, self.weight, self.bias, out=out)
        if self.lora_hidden is not None and self.lora_weight is not None:
            add_product(self.lora_hidden, self.lora_weight.t(), out=out)


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    lora_hidden: bool = False
    lora_weight: bool = False

    @property
    def any(self) -> bool:
        """Whether any gradient is wanted."""
        return self.hidden or self.kept

    @property
    def direction(self) -> bool:
        """Whether only the hidden states' is: then bracket @ W is all the backward needs."""
        return self.hidden and not self.kept

    @property
    def kept(self) -> bool:
        """Whether the brackets themselves are needed after the forward."""
        return self.weight or self.bias or self.lora_hidden or self.lora_weight


@dataclass(frozen=True)
class Gradients:
    """Where `backward` writes (rows') and adds (weights'); None where not wanted."""

    hidden: Tensor | None  # (N, D), any float dtype
    weight: Tensor | None  # (V, D), accumulation dtype
    bias: Tensor | None  # (V,), accumulation dtype
    lora_hidden: Tensor | None = None  # (N, r), any float dtype
    lora_weight: Tensor | None = None  # (V, r), accumulation dtype

    @property
    def all(self) -> tuple[Tensor | None, ...]:
        """Each, in the order of `Needs`."""
        return (self.hidden, self.weight, self.bias, self.lora_hidden, self.lora_weight)

    def rows(self, start: int, stop: int) -> "Gradients":
        """The same places, with the rows start..stop of those that have a row for each token."""
        hidden, of_lora = (
            None if value is None else value[start:stop]
            for value in (self.hidden, self.lora_hidden)
        )
        return Gradients(hidden, self.weight, self.bias, of_lora, self.lora_weight)


def new_gradients(
    needs: Needs,
    hidden: Tensor,
    weight: Tensor,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    compute_dtype: torch.dtype,
) -> Gradients:
    """Places for the gradients that are wanted: of rows to be written, of weights zeros."""
    dtype = accumulation_dtype(compute_dtype)

    def of_rows(wanted: bool, rows: Tensor | None) -> Tensor | None:
        if rows is None or not wanted:
            return None
        # float16 could underflow before the caller's loss scaling reaches it
        row_dtype = dtype if rows.dtype == torch.float16 else rows.dtype
        return torch.empty(rows.shape, dtype=row_dtype, device=rows.device)

    return Gradients(
        of_rows(needs.hidden, hidden),
        weight.new_zeros(weight.shape, dtype=dtype) if needs.weight else None,
        weight.new_zeros(weight.shape[0], dtype=dtype) if needs.bias else None,
        of_rows(needs.lora_hidden, lora_hidden),
        lora_weight.new_zeros(lora_weight.shape, dtype=dtype)
        if lora_weight is not None and needs.lora_weight
        else None,
    )


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
    lora_hidden: Tensor | None = None,
    lora_weight: Tensor | None = None,
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
        None if lora_hidden is None else operand(lora_hidden, compute_dtype),
        None if lora_weight is None else operand(lora_weight, compute_dtype),
    )
