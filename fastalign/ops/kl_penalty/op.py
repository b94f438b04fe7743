"""Registration of `kl_penalty`: one schema with the backend as argument, one fake."""

from typing import Any

import torch
from torch import Tensor

from fastalign.ops.backends import on_device
from fastalign.ops.kl_penalty.reference import Inputs
from fastalign.ops.registration import arguments_of, kernels


@torch.library.custom_op(
    "fastalign::kl_penalty",
    mutates_args=(),
    schema=f"({arguments_of(Inputs)}) -> (Tensor, Tensor, Tensor)",
)
def kl_penalty_forward(*arguments: Any) -> Any:
    """Return the reward (N,), the KL (N,) and its sums (R,)."""
    inputs = Inputs(*arguments)
    with on_device(inputs.logprob):
        return kernels("kl_penalty", inputs.backend).forward(inputs)


@kl_penalty_forward.register_fake
def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(*arguments)
    tokens, num_responses = inputs.logprob, inputs.bounds.shape[0] - 1
    reward, kl = tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape)
    return reward, kl, tokens.new_empty(num_responses)


@torch.library.custom_op(
    "fastalign::kl_penalty_backward",
    mutates_args=(),
    schema=f"(Tensor? grad_kl, Tensor? grad_sequence_kl, {arguments_of(Inputs)}) -> Tensor",
)
def kl_penalty_backward(*arguments: Any) -> Any:
    """Return the gradient (N,) of the log-probs."""
    upstream, inputs = arguments[:2], Inputs(*arguments[2:])
    with on_device(inputs.logprob):
        return kernels("kl_penalty", inputs.backend).backward(inputs, *upstream)


@kl_penalty_backward.register_fake
def _backward_fake(*arguments: Any) -> Tensor:
    logprob = Inputs(*arguments[2:]).logprob
    return logprob.new_empty(logprob.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = Inputs(*inputs)
    ctx.mark_non_differentiable(output[0])
    ctx.set_materialize_grads(False)
    # Not the adaptive coefficient, which may be updated in place before the backward.
    ctx.save_for_backward(given.logprob, given.reference_logprob, given.bounds, given.mask)
    ctx.options = (given.estimator, given.max_k3, given.backend)


def _backward(ctx: Any, _: Any, grad_kl: Tensor | None, grad_sequence_kl: Tensor | None) -> Any:
    if grad_kl is None and grad_sequence_kl is None:
        return (None,) * len(Inputs._fields)
    logprob, reference_logprob, bounds, mask = ctx.saved_tensors
    inputs = Inputs(logprob, reference_logprob, bounds, None, 0.0, None, mask, *ctx.options)
    gradient = kl_penalty_backward(grad_kl, grad_sequence_kl, *inputs)
    return gradient, *(None,) * (len(Inputs._fields) - 1)


kl_penalty_forward.register_autograd(_backward, setup_context=_setup_context)
