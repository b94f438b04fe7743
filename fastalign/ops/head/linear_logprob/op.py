"""Registration of `linear_logprob` with PyTorch: one schema, one fake kernel, one autograd formula.

The forward returns, beside its three results, what its backward needs: the brackets of the first K
rows (as many as the byte budget holds), or bracket @ W where only hidden states are trained.
"""

from typing import Any

import torch
from torch import Tensor

from fastalign.ops.head import tiled
from fastalign.ops.head.buffers import empty_rows
from fastalign.ops.head.call import NUM_TENSORS, HeadCall, as_results, fake_results
from fastalign.ops.head.head_tile import Upstream
from fastalign.ops.head.products import accumulation_dtype, product_dtype
from fastalign.ops.registration import arguments_of

ARGUMENTS = arguments_of(HeadCall)
FIVE_TENSORS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


@torch.library.custom_op(
    "fastalign::linear_logprob", mutates_args=(), schema=f"({ARGUMENTS}) -> {FIVE_TENSORS}"
)
def linear_logprob_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Return log-prob, entropy, is_argmax (T,), brackets (K, V), Jacobian (T, D) or (0, D)."""
    call = HeadCall(*arguments)
    with torch.autocast(call.hidden.device.type, enabled=False):
        buffers = call.budget(reread=call.return_entropy).buffers(call.hidden.shape[0])
        brackets, jacobian = buffers.new_brackets(), call.new_jacobian()
        saved = tiled.Saved(brackets, jacobian if call.wanted.only_hidden else None)
        read = tiled.forward(call.inputs(), buffers, saved, with_entropy=call.return_entropy)
    return read.logprob, read.entropy, read.is_argmax, brackets, jacobian


@linear_logprob_forward.register_fake
def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = HeadCall(*arguments)
    hidden, num_rows = call.hidden, call.hidden.shape[0]
    plan = call.budget(reread=call.return_entropy).plan(num_rows)
    dtype = accumulation_dtype(call.compute_dtype)
    bracket_dtype = product_dtype(call.compute_dtype, hidden.device.type)
    return (
        hidden.new_empty(num_rows, dtype=dtype),
        hidden.new_empty(num_rows, dtype=dtype),
        hidden.new_empty(num_rows, dtype=torch.bool),
        empty_rows(plan.saved_rows, call.weight.shape[0], bracket_dtype, hidden.device),
        call.new_jacobian(),
    )


@torch.library.custom_op(
    "fastalign::linear_logprob_backward",
    mutates_args=(),
    schema="(Tensor grad_logprob, Tensor? grad_entropy, Tensor brackets, Tensor jacobian, "
    f"{ARGUMENTS}) -> {FIVE_TENSORS}",
)
def linear_logprob_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    brackets: Tensor,
    jacobian: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """Return the gradients of hidden, weight, bias and LoRA's two; empty ones for the unwanted."""
    call = HeadCall(*arguments)
    with torch.autocast(call.hidden.device.type, enabled=False):
        buffers = call.budget(reread=call.return_entropy).buffers(call.hidden.shape[0])
        num_saved = 0 if grad_entropy is not None else brackets.shape[0]
        products = tiled.num_weight_products(call.hidden.shape[0], num_saved, buffers.tile_rows)
        gradients = call.new_gradients(single=products <= 1)
        saved = tiled.Saved(brackets, jacobian if call.wanted.only_hidden else None)
        upstream = Upstream(grad_logprob, grad_entropy)
        tiled.backward(call.inputs(), buffers, gradients, saved, upstream)
    return as_results(gradients.results(call.leaves), call.leaves)


@linear_logprob_backward.register_fake
def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = HeadCall(*arguments[4:])
    return fake_results(call.needs, call.leaves)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, is_argmax, brackets, jacobian = output
    ctx.mark_non_differentiable(is_argmax, brackets, jacobian)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(brackets, jacobian, *inputs[:NUM_TENSORS])
    ctx.options = inputs[NUM_TENSORS:]


def _backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> Any:
    brackets, jacobian, *tensors = ctx.saved_tensors
    call = HeadCall(*tensors, *ctx.options)
    if grad_logprob is None:
        if grad_entropy is None:
            return (None,) * len(call)
        grad_logprob = torch.zeros_like(grad_entropy)
    found = linear_logprob_backward(grad_logprob, grad_entropy, brackets, jacobian, *call)
    wanted = [value if need else None for value, need in zip(found, call.needs, strict=True)]
    return call.by_argument(wanted)


linear_logprob_forward.register_autograd(_backward, setup_context=_setup_context)
