"""Registration of `token_kl`: one schema with the backend as argument, one fake."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.backends import on_device
from fastalign.ops.registration import arguments_of
from fastalign.ops.token_kl import native, reference
from fastalign.ops.token_kl.reference import Inputs

NUM_TENSORS = 4  # the first fields of the inputs


def _launchers(backend: str) -> ModuleType:
    """Return the backend's `forward` and `backward`; Triton, which may be missing, comes late."""
    if backend == "triton":
        from fastalign.ops.token_kl import triton_kernels

        return triton_kernels
    return native if backend == "native" else reference


@torch.library.custom_op(
    "fastalign::token_kl",
    mutates_args=(),
    schema=f"({arguments_of(Inputs)}) -> (Tensor, Tensor, Tensor)",
)
def token_kl_forward(*arguments: Any) -> Any:
    """Return the KL and the two log-sum-exps, each (T,)."""
    inputs = Inputs(*arguments)
    with on_device(inputs.logits):
        return _launchers(inputs.backend).forward(inputs)


@token_kl_forward.register_fake
def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(*arguments)
    wide = torch.float64 in (inputs.logits.dtype, inputs.reference_logits.dtype)
    dtype = torch.float64 if wide else torch.float32
    rows = inputs.logits.new_empty(inputs.logits.shape[0], dtype=dtype)
    return rows, torch.empty_like(rows), torch.empty_like(rows)


@torch.library.custom_op(
    "fastalign::token_kl_backward",
    mutates_args=(),
    schema="(Tensor kl, Tensor logsumexp, Tensor reference_logsumexp, Tensor grad_kl, "
    f"{arguments_of(Inputs)}) -> Tensor",
)
def token_kl_backward(*arguments: Any) -> Any:
    """Return the gradient of the logits, (T, V) contiguous."""
    rows, inputs = arguments[:4], Inputs(*arguments[4:])
    with on_device(inputs.logits):
        return _launchers(inputs.backend).backward(inputs, *rows).contiguous()


@token_kl_backward.register_fake
def _backward_fake(*arguments: Any) -> Tensor:
    logits = Inputs(*arguments[4:]).logits
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:NUM_TENSORS])
    ctx.options = inputs[NUM_TENSORS:]


def _backward(ctx: Any, grad_kl: Tensor | None, *_: Any) -> Any:
    if grad_kl is None:
        return (None,) * len(Inputs._fields)
    *rows, logits, reference_logits, temperature, ignored = ctx.saved_tensors
    tensors = (logits, reference_logits, temperature, ignored)
    gradient = token_kl_backward(*rows, grad_kl, *tensors, *ctx.options)
    return gradient, *(None,) * (len(Inputs._fields) - 1)


token_kl_forward.register_autograd(_backward, setup_context=_setup_context)
