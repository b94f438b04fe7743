"""Registration of `token_logprob`: one schema with the backend as argument, one fake."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.backends import on_device
from fastalign.ops.token_logprob import reference


def _module(backend: str) -> ModuleType:
    """The backend's launchers: `forward` and `backward`, the same signatures in each."""
    if backend == "native":
        from fastalign.ops.token_logprob import native

        return native
    if backend == "triton":
        from fastalign.ops.token_logprob import triton_kernels

        return triton_kernels
    return reference


@torch.library.custom_op("fastalign::token_logprob", mutates_args=())
def token_logprob_forward(
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy, log-sum-exp, each (T,)."""
    with on_device(logits):
        results: tuple[Tensor, Tensor, Tensor] = _module(backend).forward(
            logits, targets, temperature, softcap, ignore_index
        )
    return results


@token_logprob_forward.register_fake
def _forward_fake(
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.new_empty(logits.shape[0], dtype=dtype)
    return rows, torch.empty_like(rows), torch.empty_like(rows)


@torch.library.custom_op("fastalign::token_logprob_backward", mutates_args=())
def token_logprob_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    logsumexp: Tensor,
    entropy: Tensor,
    backend: str,
) -> Tensor:
    """The gradient of the logits, (T, V) contiguous."""
    with on_device(logits):
        gradient: Tensor = _module(backend).backward(
            grad_logprob,
            grad_entropy,
            logits,
            targets,
            temperature,
            softcap,
            ignore_index,
            logsumexp,
            entropy,
        )
    return gradient.contiguous()


@token_logprob_backward.register_fake
def _backward_fake(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    logsumexp: Tensor,
    entropy: Tensor,
    backend: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, temperature, softcap, ignore_index, backend = inputs
    _, entropy, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, temperature, logsumexp, entropy)
    ctx.options = (softcap, ignore_index, backend)


def _backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: Any) -> Any:
    logits, targets, temperature, logsumexp, entropy = ctx.saved_tensors
    softcap, ignore_index, backend = ctx.options
    if grad_logprob is None and grad_entropy is None:
        return (None,) * 6
    gradient = token_logprob_backward(
        torch.zeros_like(logsumexp) if grad_logprob is None else grad_logprob,
        grad_entropy,
        logits,
        targets,
        temperature,
        softcap,
        ignore_index,
        logsumexp,
        entropy,
        backend,
    )
    return gradient, None, None, None, None, None


token_logprob_forward.register_autograd(_backward, setup_context=_setup_context)
