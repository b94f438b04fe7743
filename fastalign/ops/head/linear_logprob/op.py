"""Registration of `linear_logprob` with PyTorch: one schema, one fake kernel, one autograd formula.

The forward returns, beside its two results, what its backward wants: the brackets of the first K
rows (as many as the byte budget holds), or bracket @ W where only hidden states are trained.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.head.buffers import Buffers, Plan, plan_buffers
from fastalign.ops.head.linear_logprob import chunked
from fastalign.ops.head.linear_logprob.operands import Needs, head_inputs, new_gradients
from fastalign.ops.head.products import accumulation_dtype, product_dtype


def _plan(
    hidden: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    budget: int,
    needs: Needs,
    entropy: bool,
    backend: str,
) -> Plan:
    return plan_buffers(
        hidden.shape[0],
        weight.shape[0],
        dtype,
        hidden.device.type,
        budget,
        scratch=backend == "torch",
        keep=needs.kept,
        convert=needs.any,
        tile=entropy,
    )


@torch.library.custom_op("fastalign::linear_logprob", mutates_args=())
def linear_logprob_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
    max_buffer_bytes: int,
    needs: Sequence[bool],
    return_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy, is_argmax (T,), kept brackets (K, V), direction (T, D) or (0, D)."""
    wanted = Needs(*needs)
    with torch.autocast(hidden.device.type, enabled=False):
        options = (softcap, logit_scale, ignore_index, compute_dtype, lora_hidden, lora_weight)
        head = head_inputs(hidden, weight, bias, targets, temperature, *options)
        plan = _plan(
            hidden, weight, compute_dtype, max_buffer_bytes, wanted, return_entropy, backend
        )
        buffers = Buffers(plan, weight.shape[0], compute_dtype, hidden.device, backend)
        kept = buffers.new_kept(plan.kept_rows)
        direction = torch.empty(
            (hidden.shape[0] if wanted.direction else 0, hidden.shape[1]),
            dtype=accumulation_dtype(compute_dtype),
            device=hidden.device,
        )
        read = chunked.forward(
            head,
            buffers,
            kept=kept,
            direction=direction if wanted.direction else None,
            with_entropy=return_entropy,
        )
    return read.logprob, read.entropy, read.is_argmax, kept, direction


@linear_logprob_forward.register_fake
def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
    max_buffer_bytes: int,
    needs: Sequence[bool],
    return_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = Needs(*needs)
    dtype = accumulation_dtype(compute_dtype)
    plan = _plan(hidden, weight, compute_dtype, max_buffer_bytes, wanted, return_entropy, backend)
    kept_dtype = product_dtype(compute_dtype, hidden.device.type)
    num_rows = hidden.shape[0]
    return (
        hidden.new_empty(num_rows, dtype=dtype),
        hidden.new_empty(num_rows, dtype=dtype),
        hidden.new_empty(num_rows, dtype=torch.bool),
        hidden.new_empty((plan.kept_rows, weight.shape[0]), dtype=kept_dtype),
        hidden.new_empty((num_rows if wanted.direction else 0, hidden.shape[1]), dtype=dtype),
    )


@torch.library.custom_op("fastalign::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    kept: Tensor,
    direction: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
    max_buffer_bytes: int,
    needs: Sequence[bool],
    return_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias and LoRA's two; an empty tensor for each not wanted."""
    wanted = Needs(*needs)
    with torch.autocast(hidden.device.type, enabled=False):
        options = (softcap, logit_scale, ignore_index, compute_dtype, lora_hidden, lora_weight)
        head = head_inputs(hidden, weight, bias, targets, temperature, *options)
        plan = _plan(
            hidden, weight, compute_dtype, max_buffer_bytes, wanted, return_entropy, backend
        )
        gradients = new_gradients(wanted, hidden, weight, lora_hidden, lora_weight, compute_dtype)
        chunked.backward(
            head,
            Buffers(plan, weight.shape[0], compute_dtype, hidden.device, backend),
            gradients,
            grad_logprob,
            grad_entropy=grad_entropy,
            kept=kept,
            direction=direction if wanted.direction else None,
        )
    return (
        as_result(gradients.hidden, hidden),
        as_result(gradients.weight, weight),
        as_result(gradients.bias, weight if bias is None else bias),
        as_result(gradients.lora_hidden, hidden if lora_hidden is None else lora_hidden),
        as_result(gradients.lora_weight, weight if lora_weight is None else lora_weight),
    )


def as_result(gradient: Tensor | None, like: Tensor) -> Tensor:
    """The gradient in its tensor's dtype; an operator cannot return None, so else an empty one."""
    return like.new_empty(0) if gradient is None else gradient.to(like.dtype)


def _empty_like(value: Tensor | None, other: Tensor, wanted: bool) -> Tensor:
    like = other if value is None else value
    return like.new_empty(like.shape if wanted else 0)


@linear_logprob_backward.register_fake
def _backward_fake(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    kept: Tensor,
    direction: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
    max_buffer_bytes: int,
    needs: Sequence[bool],
    return_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = Needs(*needs)
    return (
        hidden.new_empty(hidden.shape if wanted.hidden else 0),
        weight.new_empty(weight.shape if wanted.weight else 0),
        (weight if bias is None else bias).new_empty(weight.shape[0] if wanted.bias else 0),
        _empty_like(lora_hidden, hidden, wanted.lora_hidden),
        _empty_like(lora_weight, weight, wanted.lora_weight),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, is_argmax, kept, direction = output
    ctx.mark_non_differentiable(is_argmax, kept, direction)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], kept, direction)
    ctx.options = inputs[7:]


def _backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> Any:
    needs = ctx.options[-3]
    if grad_logprob is None:
        if grad_entropy is None:
            return (None,) * 15
        grad_logprob = torch.zeros_like(grad_entropy)
    gradients = linear_logprob_backward(
        grad_logprob, grad_entropy, *ctx.saved_tensors, *ctx.options
    )
    hidden, weight, bias, lora_hidden, lora_weight = (
        value if need else None for value, need in zip(gradients, needs, strict=True)
    )
    return (hidden, weight, bias, None, None, lora_hidden, lora_weight, *([None] * 8))


linear_logprob_forward.register_autograd(_backward, setup_context=_setup_context)
