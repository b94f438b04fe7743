"""Registration of `linear_kl` with PyTorch: one schema, one fake kernel, one autograd formula.

The forward returns, beside its four results, what its backward wants: both brackets of the first K
rows (as many as the byte budget holds), and, where only hidden states are trained, both brackets
@ W of the other rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.head.buffers import Plan
from fastalign.ops.head.kl_tile import PairStatistics
from fastalign.ops.head.linear_kl import chunked
from fastalign.ops.head.linear_kl.buffers import PairBuffers, plan_pair
from fastalign.ops.head.linear_kl.operands import head_pair
from fastalign.ops.head.linear_logprob.op import as_result
from fastalign.ops.head.linear_logprob.operands import Gradients, Needs
from fastalign.ops.head.products import accumulation_dtype, product_dtype


def _plan(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, budget: int, needs: Needs, backend: str
) -> Plan:
    return plan_pair(
        hidden.shape[0],
        weight.shape[0],
        dtype,
        hidden.device.type,
        budget,
        trained=needs.any,
        backend=backend,
    )


def _projected_shape(hidden: Tensor, plan: Plan, needs: Needs) -> tuple[int, int, int]:
    """Of both brackets @ W of the rows that are not kept, where that is all the backward needs."""
    rest = hidden.shape[0] - plan.kept_rows
    return (2, rest if needs.direction else 0, hidden.shape[1])


@torch.library.custom_op("fastalign::linear_kl", mutates_args=())
def linear_kl_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    over_reference: bool,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
    max_buffer_bytes: int,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Four statistics (T,), kept brackets (2, K, V), brackets @ W (2, T - K, D) or (2, 0, D)."""
    wanted = Needs(*needs)
    with torch.autocast(hidden.device.type, enabled=False):
        pair = head_pair(
            hidden,
            weight,
            bias,
            reference_hidden,
            reference_weight,
            reference_bias,
            targets,
            temperature,
            over_reference,
            softcap,
            logit_scale,
            ignore_index,
            compute_dtype,
        )
        plan = _plan(hidden, weight, compute_dtype, max_buffer_bytes, wanted, backend)
        buffers = PairBuffers(plan, weight.shape[0], compute_dtype, hidden.device, backend)
        kept = buffers.new_kept(plan.kept_rows)
        shape, dtype = _projected_shape(hidden, plan, wanted), accumulation_dtype(compute_dtype)
        projected = torch.empty(shape, dtype=dtype, device=hidden.device)
        read = chunked.forward(
            pair, buffers, kept=kept, projected=projected if wanted.direction else None
        )
    return (*read, kept, projected)


@linear_kl_forward.register_fake
def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    over_reference: bool,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
    max_buffer_bytes: int,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted, dtype = Needs(*needs), accumulation_dtype(compute_dtype)
    plan = _plan(hidden, weight, compute_dtype, max_buffer_bytes, wanted, backend)
    kept_dtype = product_dtype(compute_dtype, hidden.device.type)
    return (
        *PairStatistics.empty(hidden.shape[0], hidden.new_empty(0, dtype=dtype)),
        hidden.new_empty((2, plan.kept_rows, weight.shape[0]), dtype=kept_dtype),
        hidden.new_empty(_projected_shape(hidden, plan, wanted), dtype=dtype),
    )


@torch.library.custom_op("fastalign::linear_kl_backward", mutates_args=())
def linear_kl_backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    kept: Tensor,
    projected: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    over_reference: bool,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
    max_buffer_bytes: int,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for each that is not wanted."""
    wanted, dtype = Needs(*needs), accumulation_dtype(compute_dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        pair = head_pair(
            hidden,
            weight,
            bias,
            reference_hidden,
            reference_weight,
            reference_bias,
            targets,
            temperature,
            over_reference,
            softcap,
            logit_scale,
            ignore_index,
            compute_dtype,
        )
        plan = _plan(hidden, weight, compute_dtype, max_buffer_bytes, wanted, backend)
        gradients = Gradients(
            torch.empty_like(hidden, memory_format=torch.contiguous_format)
            if wanted.hidden
            else None,
            weight.new_zeros(weight.shape, dtype=dtype) if wanted.weight else None,
            weight.new_zeros(weight.shape[0], dtype=dtype) if wanted.bias else None,
        )
        chunked.backward(
            pair,
            PairBuffers(plan, weight.shape[0], compute_dtype, hidden.device, backend),
            gradients,
            grad_logprob=grad_logprob,
            grad_entropy=grad_entropy,
            grad_kl=grad_kl,
            kept=kept,
            projected=projected if wanted.direction else None,
        )
    return (
        as_result(gradients.hidden, hidden),
        as_result(gradients.weight, weight),
        as_result(gradients.bias, weight if bias is None else bias),
    )


@linear_kl_backward.register_fake
def _backward_fake(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    kept: Tensor,
    projected: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    over_reference: bool,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
    max_buffer_bytes: int,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = Needs(*needs)
    return (
        hidden.new_empty(hidden.shape if wanted.hidden else 0),
        weight.new_empty(weight.shape if wanted.weight else 0),
        (weight if bias is None else bias).new_empty(weight.shape[0] if wanted.bias else 0),
    )


NUM_TENSORS = 8  # the first inputs of both operations


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, reference_logprob, _, _, kept, projected = output
    ctx.mark_non_differentiable(reference_logprob, kept, projected)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(kept, projected, *inputs[:NUM_TENSORS])
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
    num_inputs = NUM_TENSORS + len(ctx.options)
    if all(gradient is None for gradient in upstream):
        return (None,) * num_inputs
    gradients = linear_kl_backward(*upstream, *ctx.saved_tensors, *ctx.options)
    needs = ctx.options[-2]
    wanted = [value if need else None for value, need in zip(gradients, needs, strict=True)]
    return (*wanted, *([None] * (num_inputs - len(wanted))))


linear_kl_forward.register_autograd(_backward, setup_context=_setup_context)
