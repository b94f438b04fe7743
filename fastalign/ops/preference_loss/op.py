"""Registration of `preference_loss`'s kernels; the reference is differentiated by autograd."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.backends import on_device


def _module(backend: str) -> ModuleType:
    """The backend's launchers: `forward` and `backward`, the same signatures in each."""
    if backend == "native":
        from fastalign.ops.preference_loss import native

        return native
    assert backend == "triton", backend
    from fastalign.ops.preference_loss import triton_kernels

    return triton_kernels


@torch.library.custom_op("fastalign::preference_loss", mutates_args=())
def preference_loss_forward(
    logprob: Tensor,
    bounds: Tensor,
    reference_logprob: Tensor | None,
    length: Tensor | None,
    tie: Tensor | None,
    link: int,
    per_token: bool,
    numbers: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (B,), sequence log-probs (2B,), and each loss's derivatives by those (2B,)."""
    with on_device(logprob):
        results: tuple[Tensor, Tensor, Tensor] = _module(backend).forward(
            logprob, bounds, reference_logprob, length, tie, link, per_token, numbers
        )
    return results


@preference_loss_forward.register_fake
def _forward_fake(
    logprob: Tensor,
    bounds: Tensor,
    reference_logprob: Tensor | None,
    length: Tensor | None,
    tie: Tensor | None,
    link: int,
    per_token: bool,
    numbers: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    num_sequences = bounds.shape[0] - 1
    sequences = logprob.new_empty(num_sequences)
    return logprob.new_empty(num_sequences // 2), sequences, torch.empty_like(sequences)


@torch.library.custom_op("fastalign::preference_loss_backward", mutates_args=())
def preference_loss_backward(
    grad_losses: Tensor,
    grad_sequence_logprob: Tensor | None,
    coefficient: Tensor,
    bounds: Tensor,
    num_rows: int,
    backend: str,
) -> Tensor:
    """The gradient (N,) of the tokens' log-probs."""
    with on_device(coefficient):
        gradient: Tensor = _module(backend).backward(
            grad_losses, grad_sequence_logprob, coefficient, bounds, num_rows
        )
    return gradient


@preference_loss_backward.register_fake
def _backward_fake(
    grad_losses: Tensor,
    grad_sequence_logprob: Tensor | None,
    coefficient: Tensor,
    bounds: Tensor,
    num_rows: int,
    backend: str,
) -> Tensor:
    return coefficient.new_empty(num_rows)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprob, bounds, *_, backend = inputs
    *_, coefficient = output
    ctx.mark_non_differentiable(coefficient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(coefficient, bounds)
    ctx.options = (logprob.shape[0], backend)


def _backward(
    ctx: Any, grad_losses: Tensor | None, grad_sequence_logprob: Tensor | None, _: Any
) -> Any:
    coefficient, bounds = ctx.saved_tensors
    if grad_losses is None and grad_sequence_logprob is None:
        return (None,) * 9
    if grad_losses is None:
        grad_losses = coefficient.new_zeros(coefficient.shape[0] // 2)
    gradient = preference_loss_backward(
        grad_losses, grad_sequence_logprob, coefficient, bounds, *ctx.options
    )
    return (gradient, *((None,) * 8))


preference_loss_forward.register_autograd(_backward, setup_context=_setup_context)
