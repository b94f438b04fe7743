"""Float32 products on a CPU, by oneDNN where it is faster than the library that PyTorch takes.

PyTorch multiplies float32 matrices by MKL, which uses no AVX-512 on AMD's processors. oneDNN, which
is in PyTorch too, does: on Zen 5 its products take about half the time, and differ by rounding.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MIN_OPERATIONS = 2**21  # multiplications; of fewer, a call costs more than it gains


@cache
def onednn_is_faster() -> bool:
    """Return True on AMD's processors with AVX-512, if PyTorch has both libraries."""
    if not (torch._C.has_mkl and torch._C._has_mkldnn):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    description = Path("/proc/cpuinfo")
    return description.is_file() and "AuthenticAMD" in description.read_text()


def onednn_takes(left: Tensor, right: Tensor) -> bool:
    """Return True if the product left (..., k) @ right (k, m) is to be oneDNN's."""
    return (
        left.is_cpu
        and left.dtype == right.dtype == torch.float32
        and left.numel() * right.shape[1] >= MIN_OPERATIONS
        and onednn_is_faster()
    )


def onednn_product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return left (..., k) @ right (m, k) transposed + bias (m,)."""
    function = torch.ops.mkldnn._linear_pointwise.default
    found: Tensor = function(left, right, bias, "none", [], "")
    return found


class _LinearProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return onednn_product(rows, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,), (rows, weight) = gradients, ctx.saved_tensors
        of_rows, of_weight = ctx.needs_input_grad
        return (
            onednn_product(gradient, weight.t()) if of_rows else None,
            onednn_product(gradient.t(), rows.t()) if of_weight else None,
        )


class Linear(nn.Linear):
    """A linear layer whose large float32 products on a CPU are oneDNN's."""

    def forward(self, input: Tensor) -> Tensor:
        """Return input (..., in_features) @ weight.T + bias."""
        elsewhere = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        if elsewhere or not onednn_takes(input, self.weight.t()):
            return super().forward(input)
        if not torch.is_grad_enabled():
            return onednn_product(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features)
        output: Tensor = _LinearProduct.apply(rows, self.weight)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            output = output + self.bias
        return output.view(*input.shape[:-1], self.out_features)


def use_fastest_products(model: nn.Module) -> None:
    """Have a model's linear layers choose the faster library, where there is one."""
    if not onednn_is_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
