"""Registration of `kl_penalty`: one schema with the backend as argument, one fake."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.backends import on_device
from fastalign.ops.kl_penalty import reference


def _module(backend: str) -> ModuleType:
    """The backend's launchers: `forward` and `backward`, the same signatures in each."""
    if backend == "native":
        from fastalign.ops.kl_penalty import native

        return native
    if backend == "triton":
        from fastalign.ops.kl_penalty import triton_kernels

        return triton_kernels
    return reference


@torch.library.custom_op("fastalign::kl_penalty", mutates_args=())
def kl_penalty_forward(
    logprob: Tensor,
    reference_logprob: Tensor,
    bounds: Tensor,
    score: Tensor | None,
    coefficient: float,
    adaptive_coefficient: Tensor | None,
    mask: Tensor | None,
    estimator: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reward (N,), KL (N,) and its sums (R,)."""
    with on_device(logprob):
        results: tuple[Tensor, Tensor, Tensor] = _module(backend).forward(
            logprob,
            reference_logprob,
            bounds,
            score,
            coefficient,
            adaptive_coefficient,
            mask,
            estimator,
        )
    return results


@kl_penalty_forward.register_fake
def _forward_fake(
    logprob: Tensor,
    reference_logprob: Tensor,
    bounds: Tensor,
    score: Tensor | None,
    coefficient: float,
    adaptive_coefficient: Tensor | None,
    mask: Tensor | None,
    estimator: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_responses = logprob.shape[0], bounds.shape[0] - 1
    sizes = (num_tokens, num_tokens, num_responses)
    reward, kl, sequence_kl = (logprob.new_empty(size) for size in sizes)
    return reward, kl, sequence_kl


@torch.library.custom_op("fastalign::kl_penalty_backward", mutates_args=())
def kl_penalty_backward(
    grad_kl: Tensor | None,
    grad_sequence_kl: Tensor | None,
    logprob: Tensor,
    reference_logprob: Tensor,
    bounds: Tensor,
    mask: Tensor | None,
    estimator: str,
    backend: str,
) -> Tensor:
    """The gradient (N,) of the log-probs."""
    with on_device(logprob):
        gradient: Tensor = _module(backend).backward(
            grad_kl, grad_sequence_kl, logprob, reference_logprob, bounds, mask, estimator
        )
    return gradient


@kl_penalty_backward.register_fake
def _backward_fake(
    grad_kl: Tensor | None,
    grad_sequence_kl: Tensor | None,
    logprob: Tensor,
    reference_logprob: Tensor,
    bounds: Tensor,
    mask: Tensor | None,
    estimator: str,
    backend: str,
) -> Tensor:
    return logprob.new_empty(logprob.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprob, reference_logprob, bounds, _, _, _, mask, estimator, backend = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logprob, reference_logprob, bounds, mask)
    ctx.options = (estimator, backend)


def _backward(
    ctx: Any, _: Any, grad_kl: Tensor | None, grad_sequence_kl: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_kl is None and grad_sequence_kl is None:
        return (None,) * 9
    upstream = (grad_kl, grad_sequence_kl)
    gradient = kl_penalty_backward(*upstream, *ctx.saved_tensors, *ctx.options)
    return gradient, *(None,) * 8


kl_penalty_forward.register_autograd(_backward, setup_context=_setup_context)
