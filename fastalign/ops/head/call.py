"""One call of a head operation: its checked arguments, and what is made from them.

Legend: T rows, V vocabulary, D hidden, r rank, K rows whose brackets are saved.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.head.buffers import Budget
from fastalign.ops.head.head_tile import HeadTransform
from fastalign.ops.head.operands import Gradients, HeadInputs, Needs
from fastalign.ops.head.products import (
    ProductSum,
    accumulation_dtype,
    operand,
    product_dtype,
    weight_operand,
)


class HeadCall(NamedTuple):
    """The checked arguments of one call; also the schema of `fastalign::linear_logprob`.

    Attributes:
        hidden: (T, D) hidden states.
        weight: (V, D) weight.
        bias: (V,) bias, or None.
        targets: (T,) int64 token ids.
        temperature: (1,) or (T,); None: 1.0.
        lora_hidden: (T, r) scaling * hidden @ A^T, or None.
        lora_weight: (V, r) LoRA's B, or None.
        softcap: cap of the logits, or None.
        logit_scale: factor of the logits.
        ignore_index: target of an ignored row.
        compute_dtype: dtype that operands are rounded to.
        max_buffer_bytes: budget of logits, scratch and saved brackets.
        needs: wanted gradients, in the order of `Needs`.
        return_entropy: True if entropies are wanted.
        backend: "torch", "native" or "triton"; for `linear_logprob` also "reference", and without
            gradients "epilogue".
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperature: Tensor | None
    lora_hidden: Tensor | None
    lora_weight: Tensor | None
    softcap: float | None
    logit_scale: float
    ignore_index: int
    compute_dtype: torch.dtype
    max_buffer_bytes: int
    needs: Sequence[bool]
    return_entropy: bool
    backend: str

    @property
    def wanted(self) -> Needs:
        """Which gradients are wanted."""
        return Needs(*self.needs)

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        """The arguments that may be trained, in the order of `Needs`."""
        return (self.hidden, self.weight, self.bias, self.lora_hidden, self.lora_weight)

    def inputs(self) -> HeadInputs:
        """Return the operands, rounded to `compute_dtype`."""
        dtype, ignored = self.compute_dtype, self.targets == self.ignore_index
        # without coefficients float16 does not underflow
        low = dtype if self.backend == "epilogue" else product_dtype(dtype, self.hidden.device.type)
        return HeadInputs(
            operand(self.hidden, dtype, low),
            weight_operand(self.weight, dtype, low),
            None if self.bias is None else self.bias.to(accumulation_dtype(dtype)),
            self.targets.masked_fill(ignored, 0),
            ignored,
            HeadTransform(self.temperature, self.softcap, self.logit_scale),
            None if self.lora_hidden is None else operand(self.lora_hidden, dtype, low),
            None if self.lora_weight is None else operand(self.lora_weight, dtype, low),
        )

    def budget(self, *, reread: bool, planned_columns: int | None = None) -> Budget:
        """Return the budget that decides the buffers' sizes.

        Args:
            reread: True if rows may have to be read again even where every bracket is saved.
            planned_columns: columns to plan for, if not those of the weight.
        """
        num_columns = self.weight.shape[0]
        return Budget(
            planned_columns or num_columns,
            self.compute_dtype,
            self.hidden.device,
            self.max_buffer_bytes,
            self.backend,
            self.wanted.brackets,
            self.wanted.any,
            reread,
            num_columns,
        )

    def new_jacobian(self) -> Tensor:
        """Return an empty tensor for bracket @ W: (T, D), or (0, D) where it is not wanted."""
        rows = self.hidden.shape[0] if self.wanted.only_hidden else 0
        dtype = accumulation_dtype(self.compute_dtype)
        return self.hidden.new_empty((rows, self.hidden.shape[1]), dtype=dtype)

    def new_gradients(self, *, single: bool) -> Gradients:
        """Return the wanted gradients: empty tensors of rows, sums of products for weights.

        Args:
            single: True if every weight's gradient is one product at most.
        """
        needs = self.wanted

        def rows_like(wanted: bool, rows: Tensor | None) -> Tensor | None:
            if rows is None or not wanted:
                return None
            # float16 could underflow before the caller's loss scaling reaches it
            wide = accumulation_dtype(self.compute_dtype)
            row_dtype = wide if rows.dtype == torch.float16 else rows.dtype
            return torch.empty(rows.shape, dtype=row_dtype, device=rows.device)

        def sum_for(wanted: bool, leaf: Tensor | None) -> ProductSum | None:
            if leaf is None or not wanted:
                return None
            return ProductSum(leaf, self.compute_dtype, single=single)

        return Gradients(
            rows_like(needs.hidden, self.hidden),
            sum_for(needs.weight, self.weight),
            sum_for(needs.bias, self.bias),
            rows_like(needs.lora_hidden, self.lora_hidden),
            sum_for(needs.lora_weight, self.lora_weight),
        )

    def by_argument(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Return the gradients of the leaves as autograd wants them: one for every argument."""
        hidden, weight, bias, lora_hidden, lora_weight = gradients
        nones = (None,) * (len(self) - NUM_TENSORS)
        return (hidden, weight, bias, None, None, lora_hidden, lora_weight, *nones)


NUM_TENSORS = HeadCall._fields.index("softcap")


def as_results(
    gradients: Sequence[Tensor | None], leaves: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Return the gradients of an operator, which cannot return None: an empty tensor for each."""
    like = next(leaf for leaf in leaves if leaf is not None)
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def fake_results(needs: Sequence[bool], leaves: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Return what `as_results` returns for the wanted gradients, without data."""
    like = next(leaf for leaf in leaves if leaf is not None)
    return tuple(
        leaf.new_empty(leaf.shape) if need and leaf is not None else like.new_empty(0)
        for need, leaf in zip(needs, leaves, strict=True)
    )
