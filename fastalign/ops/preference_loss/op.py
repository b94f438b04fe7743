"""Registration of `preference_loss`'s kernels; the reference is differentiated by autograd."""

from typing import Any

import torch
from torch import Tensor

from fastalign.ops.backends import on_device
from fastalign.ops.preference_loss.reference import Inputs
from fastalign.ops.registration import arguments_of, kernels


@torch.library.custom_op(
    "fastalign::preference_loss",
    mutates_args=(),
    schema=f"({arguments_of(Inputs)}) -> (Tensor, Tensor, Tensor)",
)
def preference_loss_forward(*arguments: Any) -> Any:
    """Return losses (B,), sequence log-probs (2B,), and each loss's derivatives by those (2B,)."""
    inputs = Inputs(*arguments)
    with on_device(inputs.logprob):
        return kernels("preference_loss", inputs.backend).forward(inputs)


@preference_loss_forward.register_fake
def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(*arguments)
    num_sequences = inputs.bounds.shape[0] - 1
    sequences = inputs.logprob.new_empty(num_sequences)
    return inputs.logprob.new_empty(num_sequences // 2), sequences, torch.empty_like(sequences)


@torch.library.custom_op(
    "fastalign::preference_loss_backward",
    mutates_args=(),
    schema="(Tensor grad_losses, Tensor? grad_sequence_logprob, Tensor coefficient, Tensor bounds, "
    "int num_rows, str backend) -> Tensor",
)
def preference_loss_backward(*arguments: Any) -> Any:
    """Return the gradient (N,) of the tokens' log-probs."""
    *rest, backend = arguments
    with on_device(arguments[0]):
        return kernels("preference_loss", backend).backward(*rest)


@preference_loss_backward.register_fake
def _backward_fake(*arguments: Any) -> Tensor:
    *_, coefficient, _, num_rows, _ = arguments
    return coefficient.new_empty(num_rows)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, coefficient = Inputs(*inputs), output[2]
    ctx.mark_non_differentiable(coefficient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(coefficient, given.bounds)
    ctx.options = (given.logprob.shape[0], given.backend)


def _backward(
    ctx: Any, grad_losses: Tensor | None, grad_sequence_logprob: Tensor | None, _: Any
) -> Any:
    if grad_losses is None and grad_sequence_logprob is None:
        return (None,) * len(Inputs._fields)
    coefficient, bounds = ctx.saved_tensors
    if grad_losses is None:
        grad_losses = coefficient.new_zeros(coefficient.shape[0] // 2)
    gradient = preference_loss_backward(
        grad_losses, grad_sequence_logprob, coefficient, bounds, *ctx.options
    )
    return gradient, *(None,) * (len(Inputs._fields) - 1)


preference_loss_forward.register_autograd(_backward, setup_context=_setup_context)
