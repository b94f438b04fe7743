"""Registration of `token_kl`: one schema with the backend as argument, one fake."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.backends import on_device
from fastalign.ops.token_kl import reference


def _module(backend: str) -> ModuleType:
    """The backend's launchers: `forward` and `backward`, the same signatures in each."""
    if backend == "native":
        from fastalign.ops.token_kl import native

        return native
    if backend == "triton":
        from fastalign.ops.token_kl import triton_kernels

        return triton_kernels
    return reference


@torch.library.custom_op("fastalign::token_kl", mutates_args=())
def token_kl_forward(
    logits: Tensor,
    reference_logits: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    over_reference: bool,
    ignored: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL, and the two log-sum-exps, each (T,)."""
    with on_device(logits):
        results: tuple[Tensor, Tensor, Tensor] = _module(backend).forward(
            logits, reference_logits, temperature, softcap, over_reference, ignored
        )
    return results


@token_kl_forward.register_fake
def _forward_fake(
    logits: Tensor,
    reference_logits: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    over_reference: bool,
    ignored: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 in (logits.dtype, reference_logits.dtype)
    rows = logits.new_empty(logits.shape[0], dtype=torch.float64 if wide else torch.float32)
    return rows, torch.empty_like(rows), torch.empty_like(rows)


@torch.library.custom_op("fastalign::token_kl_backward", mutates_args=())
def token_kl_backward(
    grad_kl: Tensor,
    logits: Tensor,
    reference_logits: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    over_reference: bool,
    ignored: Tensor | None,
    kl: Tensor,
    logsumexp: Tensor,
    reference_logsumexp: Tensor,
    backend: str,
) -> Tensor:
    """The gradient of the logits, (T, V) contiguous."""
    with on_device(logits):
        gradient: Tensor = _module(backend).backward(
            grad_kl,
            logits,
            reference_logits,
            temperature,
            softcap,
            over_reference,
            ignored,
            kl,
            logsumexp,
            reference_logsumexp,
        )
    return gradient.contiguous()


@token_kl_backward.register_fake
def _backward_fake(
    grad_kl: Tensor,
    logits: Tensor,
    reference_logits: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    over_reference: bool,
    ignored: Tensor | None,
    kl: Tensor,
    logsumexp: Tensor,
    reference_logsumexp: Tensor,
    backend: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, reference_logits, temperature, softcap, over_reference, ignored, backend = inputs
    kl, logsumexp, reference_logsumexp = output
    ctx.mark_non_differentiable(logsumexp, reference_logsumexp)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        logits, reference_logits, temperature, ignored, kl, logsumexp, reference_logsumexp
    )
    ctx.options = (softcap, over_reference, backend)


def _backward(ctx: Any, grad_kl: Tensor | None, *_: Any) -> Any:
    if grad_kl is None:
        return (None,) * 7
    logits, reference_logits, temperature, ignored, *rows = ctx.saved_tensors
    softcap, over_reference, backend = ctx.options
    gradient = token_kl_backward(
        grad_kl,
        logits,
        reference_logits,
        temperature,
        softcap,
        over_reference,
        ignored,
        *rows,
        backend,
    )
    return (gradient, *([None] * 6))


token_kl_forward.register_autograd(_backward, setup_context=_setup_context)
