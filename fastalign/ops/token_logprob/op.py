"""Registration of `token_logprob`: one schema with the backend as argument, one fake."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.backends import on_device
from fastalign.ops.packed_arguments import compute_dtype
from fastalign.ops.registration import arguments_of
from fastalign.ops.token_logprob import native, reference
from fastalign.ops.token_logprob.reference import Inputs

NUM_TENSORS = 3  # the first fields of the inputs


def _launchers(backend: str) -> ModuleType:
    """Return the backend's `forward` and `backward`; Triton, which may be missing, comes late."""
    if backend == "triton":
        from fastalign.ops.token_logprob import triton_kernels

        return triton_kernels
    return native if backend == "native" else reference


@torch.library.custom_op(
    "fastalign::token_logprob",
    mutates_args=(),
    schema=f"({arguments_of(Inputs)}) -> (Tensor, Tensor, Tensor)",
)
def token_logprob_forward(*arguments: Any) -> Any:
    """Return log-prob, entropy and log-sum-exp, each (T,)."""
    inputs = Inputs(*arguments)
    with on_device(inputs.logits):
        return _launchers(inputs.backend).forward(inputs)


@token_logprob_forward.register_fake
def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    logits = Inputs(*arguments).logits
    rows = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits))
    return rows, torch.empty_like(rows), torch.empty_like(rows)


@torch.library.custom_op(
    "fastalign::token_logprob_backward",
    mutates_args=(),
    schema="(Tensor entropy, Tensor logsumexp, Tensor grad_logprob, Tensor? grad_entropy, "
    f"{arguments_of(Inputs)}) -> Tensor",
)
def token_logprob_backward(*arguments: Any) -> Any:
    """Return the gradient of the logits, (T, V) contiguous."""
    rows, inputs = arguments[:4], Inputs(*arguments[4:])
    with on_device(inputs.logits):
        return _launchers(inputs.backend).backward(inputs, *rows).contiguous()


@token_logprob_backward.register_fake
def _backward_fake(*arguments: Any) -> Tensor:
    logits = Inputs(*arguments[4:]).logits
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, entropy, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(entropy, logsumexp, *inputs[:NUM_TENSORS])
    ctx.options = inputs[NUM_TENSORS:]


def _backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: Any) -> Any:
    if grad_logprob is None and grad_entropy is None:
        return (None,) * len(Inputs._fields)
    entropy, logsumexp, *tensors = ctx.saved_tensors
    if grad_logprob is None:
        grad_logprob = torch.zeros_like(logsumexp)
    upstream = (grad_logprob, grad_entropy)
    gradient = token_logprob_backward(entropy, logsumexp, *upstream, *tensors, *ctx.options)
    return gradient, *(None,) * (len(Inputs._fields) - 1)


token_logprob_forward.register_autograd(_backward, setup_context=_setup_context)
