"""Registration of `linear_kl` with PyTorch: one schema, one fake kernel, one autograd formula.

The forward returns, beside its four results, what its backward needs: both brackets of the first K
rows (as many as the byte budget holds), and, where only hidden states are trained, both brackets
@ W of the other rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops.head.buffers import Budget, empty_rows, padded_columns
from fastalign.ops.head.call import HeadCall, as_results, fake_results
from fastalign.ops.head.kl_tile import PairStatistics
from fastalign.ops.head.linear_kl import tiled
from fastalign.ops.head.linear_kl.tiled import PairBuffers, PairInputs, SavedPair
from fastalign.ops.head.operands import HeadInputs
from fastalign.ops.head.products import (
    accumulation_dtype,
    operand,
    product_dtype,
    weight_operand,
)
from fastalign.ops.registration import arguments_of


class PairCall(NamedTuple):
    """The checked arguments of one call; also the operation's schema.

    Attributes:
        hidden: (T, D) policy's hidden states.
        weight: (V, D) policy's weight.
        bias: (V,) policy's bias, or None.
        reference_hidden: (T, E) reference's hidden states.
        reference_weight: (V, E) reference's weight.
        reference_bias: (V,) reference's bias, or None.
        targets: (T,) int64 token ids.
        temperature: (1,) or (T,); None: 1.0.
        over_reference: KL(reference || policy) instead of KL(policy || reference).
        softcap: cap of both heads' logits, or None.
        logit_scale: factor of both heads' logits.
        ignore_index: target of an ignored row.
        compute_dtype: dtype that operands are rounded to.
        max_buffer_bytes: budget of logits, scratch and saved brackets.
        needs: wanted gradients: of hidden, weight and bias.
        backend: "torch", "native" or "triton".
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    reference_hidden: Tensor
    reference_weight: Tensor
    reference_bias: Tensor | None
    targets: Tensor
    temperature: Tensor | None
    over_reference: bool
    softcap: float | None
    logit_scale: float
    ignore_index: int
    compute_dtype: torch.dtype
    max_buffer_bytes: int
    needs: Sequence[bool]
    backend: str

    @property
    def policy(self) -> HeadCall:
        """The call of the policy's head alone."""
        shared = (self.softcap, self.logit_scale, self.ignore_index, self.compute_dtype)
        needs = (*self.needs, False, False)
        head = (self.hidden, self.weight, self.bias, self.targets, self.temperature, None, None)
        return HeadCall(*head, *shared, self.max_buffer_bytes, needs, True, self.backend)

    def inputs(self) -> PairInputs:
        """Return the operands, rounded to `compute_dtype`; a weight that both share, once."""
        policy, dtype = self.policy.inputs(), self.compute_dtype
        shared, bias = self.reference_weight.is_set_to(self.weight), self.reference_bias
        reference = HeadInputs(
            operand(self.reference_hidden, dtype),
            policy.weight if shared else weight_operand(self.reference_weight, dtype),
            None if bias is None else bias.to(accumulation_dtype(dtype)),
            policy.targets,
            policy.ignored,
            policy.transform,
        )
        return PairInputs(policy, reference, self.over_reference)

    def budget(self) -> Budget:
        """Return the budget of the buffers: that of a head with twice the vocabulary."""
        trained = any(self.needs)
        return Budget(
            2 * padded_columns(self.weight.shape[0], self.hidden.device.type),
            self.compute_dtype,
            self.hidden.device,
            self.max_buffer_bytes,
            self.backend,
            save=trained,
            convert=trained,
            # saved brackets are combined in it, and rows may have to be read again
            reread=True,
        )

    def buffers(self) -> PairBuffers:
        """Return the call's scratch memory."""
        return PairBuffers(self.budget().buffers(self.hidden.shape[0]), self.weight.shape[0])

    def new_jacobians(self, saved_rows: int) -> Tensor:
        """Return an empty tensor for both brackets @ W: (2, T - K, D), or (2, 0, D) if unwanted."""
        rest = self.hidden.shape[0] - saved_rows if self.policy.wanted.only_hidden else 0
        dtype = accumulation_dtype(self.compute_dtype)
        return self.hidden.new_empty((2, rest, self.hidden.shape[1]), dtype=dtype)


ARGUMENTS = arguments_of(PairCall)
NUM_TENSORS = PairCall._fields.index("over_reference")


@torch.library.custom_op(
    "fastalign::linear_kl",
    mutates_args=(),
    schema=f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_kl_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Return four statistics (T,), brackets (2, K, V), brackets @ W (2, T - K, D) or (2, 0, D)."""
    call = PairCall(*arguments)
    with torch.autocast(call.hidden.device.type, enabled=False):
        buffers = call.buffers()
        brackets = buffers.new_brackets()
        jacobians = call.new_jacobians(brackets.shape[1])
        saved = SavedPair(brackets, jacobians if call.policy.wanted.only_hidden else None)
        read = tiled.forward(call.inputs(), buffers, saved)
    return (*read, brackets, jacobians)


@linear_kl_forward.register_fake
def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = PairCall(*arguments)
    num_rows, dtype = call.hidden.shape[0], call.compute_dtype
    saved_rows = call.budget().plan(num_rows).saved_rows
    like = call.hidden.new_empty(0, dtype=accumulation_dtype(dtype))
    num_columns, bracket_dtype = call.weight.shape[0], product_dtype(dtype, like.device.type)
    rows = empty_rows(2 * saved_rows, num_columns, bracket_dtype, like.device)
    brackets = rows.view(2, saved_rows, num_columns)
    return (*PairStatistics.empty(num_rows, like), brackets, call.new_jacobians(saved_rows))


@torch.library.custom_op(
    "fastalign::linear_kl_backward",
    mutates_args=(),
    schema="(Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_kl, Tensor brackets, "
    f"Tensor jacobians, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def linear_kl_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of hidden, weight and bias; an empty tensor for each not wanted."""
    grads, (brackets, jacobians) = arguments[:3], arguments[3:5]
    call = PairCall(*arguments[5:])
    with torch.autocast(call.hidden.device.type, enabled=False):
        saved = SavedPair(brackets, jacobians if call.policy.wanted.only_hidden else None)
        buffers, num_rows = call.buffers(), call.hidden.shape[0]
        single = tiled.num_weight_products(num_rows, buffers, saved, grads) <= 1
        gradients = call.policy.new_gradients(single=single)
        tiled.backward(call.inputs(), buffers, gradients, saved, grads)
    return as_results(gradients.results(call.policy.leaves)[:3], call[:3])


@linear_kl_backward.register_fake
def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = PairCall(*arguments[5:])
    return fake_results(call.needs, call[:3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, reference_logprob, _, _, brackets, jacobians = output
    ctx.mark_non_differentiable(reference_logprob, brackets, jacobians)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(brackets, jacobians, *inputs[:NUM_TENSORS])
    ctx.options = inputs[NUM_TENSORS:]


def _backward(
    ctx: Any,
    grad_logprob: Tensor | None,
    _reference: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    *_: Any,
) -> Any:
    upstream = (grad_logprob, grad_entropy, grad_kl)
    nones = (None,) * (len(PairCall._fields) - 3)
    if all(gradient is None for gradient in upstream):
        return (None, None, None, *nones)
    found = linear_kl_backward(*upstream, *ctx.saved_tensors, *ctx.options)
    needs = PairCall(*ctx.saved_tensors[2:], *ctx.options).needs
    return (*(each if need else None for each, need in zip(found, needs, strict=True)), *nones)


linear_kl_forward.register_autograd(_backward, setup_context=_setup_context)
