"""Hands gradients that were computed in the forward to autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor


class GradientHolder:
    """The gradients that the forward computed, until the backward hands them on, once."""

    def __init__(self, gradients: Sequence[Tensor | None]) -> None:
        self._gradients: list[Tensor | None] | None = list(gradients)

    def scaled(self, scale: Tensor) -> list[Tensor | None]:
        """The gradients times `scale`, in place: the weight's is large, a copy would double it."""
        if self._gradients is None:
            raise RuntimeError(
                "fused_linear_loss computes its gradient once, in the forward, and has handed it "
                "on: call the function again to go backward a second time"
            )
        gradients, self._gradients = self._gradients, None
        return [None if g is None else g.mul_(scale.to(g.dtype)) for g in gradients]


class GradientInForward(torch.autograd.Function):
    """Gives the loss a backward that multiplies gradients already computed."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        loss: Tensor,
        holder: GradientHolder,
        *leaves: Tensor | None,
    ) -> Tensor:
        """The loss, now a function of the leaves; their gradients wait in `holder`."""
        ctx.holder = holder  # type: ignore[attr-defined]
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in leaves]  # type: ignore[attr-defined]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_loss: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The waiting gradients times the upstream one, each in its leaf's dtype."""
        gradients = ctx.holder.scaled(grad_loss)  # type: ignore[attr-defined]
        dtypes = ctx.dtypes  # type: ignore[attr-defined]
        cast = [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, dtypes, strict=True)
        ]
        return (None, None, *cast)
