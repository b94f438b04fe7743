"""RMSNorm, gated activations and rotary embeddings of a model's layers, in native code on a CPU.

PyTorch computes each as a chain of element-wise operations, with a pass over memory for every one
and saved results between them; here each is one pass. The formulas are those of transformers'
layers, which `fastalign.models.fused_layers` compares them with.

Legend: N tokens, D columns.
"""

import ctypes
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastalign.ops import native_library
from fastalign.ops.native_library import DTYPE_CODES, Argument, call
from fastalign.ops.recomputed import recompute

Activation = Literal["silu", "gelu_tanh"]
_ACTIVATION_CODES = {"silu": 0, "gelu_tanh": 1}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # of a gated activation
_NORM_BLOCK = 64  # as in csrc/cpu/layers_rows.h
_ROTARY_DTYPES = (torch.float32, torch.bfloat16)


# A shard of a tensor is none of these.
_PLAIN = (Tensor, nn.Parameter, FakeTensor)


def usable(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Return True if native code computes tensors like these: on a CPU, of one of the dtypes."""
    return (
        not torch.compiler.is_compiling()
        and native_library.unusable_reason("cpu") is None
        and all(
            tensor.device.type == "cpu" and tensor.dtype in dtypes and type(tensor) in _PLAIN
            for tensor in tensors
        )
    )


def launch(name: str, arguments: list[Argument | Tensor | None]) -> None:
    """Call a native function; not where an estimate of memory has tensors without data."""
    first = arguments[0]
    assert isinstance(first, Tensor)
    if not isinstance(first, FakeTensor):
        call(name, first.device, arguments)


def _norm_rows(
    rows: Tensor, weight: Tensor, offset: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return the normalised rows, and what each was multiplied by."""
    num_columns = rows.shape[-1]
    num_rows = rows.numel() // max(num_columns, 1)
    output, scale = torch.empty_like(rows), rows.new_empty(num_rows)
    sizes = [ctypes.c_int64(num_rows), ctypes.c_int64(num_columns)]
    numbers = [ctypes.c_float(offset), ctypes.c_float(epsilon)]
    launch("rms_norm_forward", [rows, weight, *numbers, *sizes, output, scale])
    return output, scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offset: float, epsilon: float) -> Tensor:
        output, scale = _norm_rows(x, weight, offset, epsilon)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset, ctx.sizes = offset, (scale.numel(), x.shape[-1])
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, weight, scale = ctx.saved_tensors
        num_rows, num_columns = ctx.sizes
        grad_weight = partial = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            partial = rows.new_empty(-(-num_rows // _NORM_BLOCK), num_columns)
        grad_x = torch.empty_like(rows)
        launch(
            "rms_norm_backward",
            [
                rows,
                weight,
                ctypes.c_float(ctx.offset),
                scale,
                gradients[0].contiguous(),
                ctypes.c_int64(num_rows),
                ctypes.c_int64(num_columns),
                grad_x,
                grad_weight,
                partial,
            ],
        )
        return grad_x, grad_weight, None, None


def rms_norm(x: Tensor, weight: Tensor, offset: float, epsilon: float) -> Tensor:
    """Return x / sqrt(mean(x**2) + epsilon) * (weight + offset), by rows (arXiv 1910.07467, eq. 4).

    Args:
        x: (..., D) float32, on a CPU.
        weight: (D,) float32.
        offset: 0, or 1 where the weight is the distance from 1, as in Gemma.
        epsilon: is added to the mean square.

    Returns:
        (..., D) float32, differentiable in `x` and `weight`; the gradient of `weight` is added up
        in an order that does not depend on the number of threads.
    """
    x, weight = x.contiguous(), weight.contiguous()
    found: Tensor = _RMSNorm.apply(x, weight, offset, epsilon)  # type: ignore[no-untyped-call]
    rows, factors = x.detach(), weight.detach()
    recompute(found, lambda: _norm_rows(rows, factors, offset, epsilon)[0])
    return found


def _gated_options(gate: Tensor, activation: Activation) -> list[Argument]:
    return [
        ctypes.c_int32(DTYPE_CODES[gate.dtype]),
        ctypes.c_int32(_ACTIVATION_CODES[activation]),
        ctypes.c_int64(gate.numel()),
    ]


def _gate(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    output = torch.empty_like(gate)
    launch("gated_activation_forward", [gate, up, *_gated_options(gate, activation), output])
    return output


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _gate(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        options = _gated_options(gate, ctx.activation)
        passed = [gate, up, *options, gradients[0].contiguous(), grad_gate, grad_up]
        launch("gated_activation_backward", passed)
        return grad_gate, grad_up, None


def gated_activation(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return activation(gate) * up (arXiv 2002.05202, eq. 5 and 6).

    Args:
        gate: tensor on a CPU, float32, bfloat16 or float16.
        up: tensor of the same shape and dtype.
        activation: "silu", or "gelu_tanh", GELU by its approximation with tanh.

    Returns:
        Tensor of the same shape and dtype, computed in float32, differentiable in both.
    """
    gate, up = gate.contiguous(), up.contiguous()
    found: Tensor = _GatedActivation.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    kept = gate.detach(), up.detach()
    recompute(found, lambda: _gate(*kept, activation))
    return found


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """Return the rotation of x (B, T, H, D) by cos and sin (B, T, D), or its transpose."""
    x = x.contiguous()
    output = torch.empty_like(x, dtype=dtype)
    num_heads, head_dim = x.shape[-2:]
    num_rows = x.numel() // max(num_heads * head_dim, 1)
    launch(
        "rotary",
        [
            x,
            ctypes.c_int32(DTYPE_CODES[x.dtype]),
            cos,
            sin,
            ctypes.c_int64(num_rows),
            ctypes.c_int64(num_heads),
            ctypes.c_int64(head_dim),
            ctypes.c_int32(transposed),
            output,
            ctypes.c_int32(DTYPE_CODES[dtype]),
        ],
    )
    return output


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, _, num_tokens, head_dim = x.shape
        dtype = torch.promote_types(x.dtype, cos.dtype)
        cos, sin = (
            each.float().expand(batch, num_tokens, head_dim).contiguous() for each in (cos, sin)
        )
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotate(x.transpose(1, 2), cos, sin, dtype, False).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        found = _rotate(gradients[0].transpose(1, 2), cos, sin, ctx.dtype, True)
        return found.transpose(1, 2), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x * cos + rotate_half(x) * sin (arXiv 2104.09864, eq. 34, in halves).

    Args:
        x: (B, H, T, D) queries or keys, float32 or bfloat16, on a CPU; the heads of a token are
            best next to each other in memory.
        cos: (B or 1, T, D), float32 or bfloat16.
        sin: as `cos`.

    Returns:
        (B, H, T, D) in the dtype that x * cos has, with a token's heads next to each other;
        differentiable in `x`.
    """
    found: Tensor = _Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return found


def rotary_usable(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return True if `rotary` computes tensors like these."""
    return (
        usable(x, cos, sin, dtypes=_ROTARY_DTYPES)
        and x.ndim == 4
        and cos.shape == sin.shape
        and cos.shape in {(size, x.shape[2], x.shape[3]) for size in (1, x.shape[0])}
        and x.shape[3] % 2 == 0
        and not (cos.requires_grad or sin.requires_grad)
    )
