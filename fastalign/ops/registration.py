"""Registration with `torch.library`: schemas from NamedTuples, and operations on rows of logits."""

from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor

from fastalign.ops.backends import gradient_rows, on_device

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    float: "float",
    float | None: "float?",
    str: "str",
    torch.dtype: "ScalarType",
    Sequence[bool]: "bool[]",
    Sequence[float]: "float[]",
}


def arguments_of(inputs: type[tuple[Any, ...]]) -> str:
    """Return the fields of a NamedTuple as the arguments of a schema: `Tensor x, float? cap`."""
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(inputs).items())


def kernels(operation: str, backend: str) -> ModuleType:
    """Return an operation's module of a backend: "native", "triton" or "reference".

    It is imported when it is first needed, for Triton may be missing.
    """
    module = "triton_kernels" if backend == "triton" else backend
    return import_module(f"fastalign.ops.{operation}.{module}")


def register_rows(
    name: str, inputs: type[Any], results: Sequence[str], num_differentiable: int
) -> Callable[..., Any]:
    """Register an operation on rows of logits, and its backward; return the forward.

    One schema with the backend as argument, one fake. Results are each (T,), float64 if a matrix
    of the inputs is, else float32; the backward gets all of them, then the gradients of the first
    ones: zeros in place of the first of those if that is not given, None for another.

    Args:
        name: name in the namespace `fastalign`, and of the operation's folder.
        inputs: NamedTuple of the arguments: tensors, the differentiable logits (T, V) first, then
            numbers, and the backend last.
        results: names of the results.
        num_differentiable: how many of them, the first ones, are differentiable in the logits.
    """
    fields = get_type_hints(inputs)
    num_tensors = sum(kind in (Tensor, Tensor | None) for kind in fields.values())

    @torch.library.custom_op(
        f"fastalign::{name}",
        mutates_args=(),
        schema=f"({arguments_of(inputs)}) -> ({', '.join(['Tensor'] * len(results))})",
    )
    def forward(*arguments: Any) -> Any:
        with on_device(arguments[0]):
            return tuple(kernels(name, arguments[-1]).forward(inputs(*arguments)))

    @forward.register_fake
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        matrices = [x for x in arguments[:num_tensors] if x is not None and x.ndim == 2]
        wide = torch.float64 in [matrix.dtype for matrix in matrices]
        dtype = torch.float64 if wide else torch.float32
        num_rows = matrices[0].shape[0]
        return tuple(matrices[0].new_empty(num_rows, dtype=dtype) for _ in results)

    backward = _register_backward(name, inputs, results, num_differentiable)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[num_differentiable:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *inputs[:num_tensors])
        ctx.options = inputs[num_tensors:]

    def of_logits(ctx: Any, *gradients: Tensor | None) -> Any:
        first, *others = gradients[:num_differentiable]
        nothing = (None,) * (len(fields) - 1)
        if first is None and not any(value is not None for value in others):
            return None, *nothing
        saved = ctx.saved_tensors
        if first is None:
            first = torch.zeros_like(saved[0])
        rows = (*saved[: len(results)], first, *others)
        return backward(*rows, *saved[len(results) :], *ctx.options), *nothing

    forward.register_autograd(of_logits, setup_context=setup_context)
    return forward


def _register_backward(
    name: str, inputs: type[Any], results: Sequence[str], num_differentiable: int
) -> Callable[..., Any]:
    """Register and return the backward of an operation: the arguments are those of the forward."""
    rows = [f"Tensor {result}" for result in results]
    rows += [f"Tensor? grad_{result}" for result in results[:num_differentiable]]
    num_rows = len(rows)

    @torch.library.custom_op(
        f"fastalign::{name}_backward",
        mutates_args=(),
        schema=f"({', '.join(rows)}, {arguments_of(inputs)}) -> Tensor",
    )
    def backward(*arguments: Any) -> Any:
        with on_device(arguments[0]):
            gradient = kernels(name, arguments[-1]).backward(
                inputs(*arguments[num_rows:]), *arguments[:num_rows]
            )
        return gradient if arguments[-1] == "triton" else gradient.contiguous()

    @backward.register_fake
    def _(*arguments: Any) -> Any:
        return gradient_rows(arguments[num_rows], arguments[-1])

    return backward
