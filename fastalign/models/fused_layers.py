"""A model's norms, gated MLPs and rotary embeddings by the one-pass kernels of `ops.layers`.

Which layers these are, no list of models says: each is tried with random numbers, and keeps its own
code unless the kernel's results and gradients are the same up to rounding. A layer that is
exchanged becomes a subclass of its class, with the same parameters, hooks and name. It takes its
own code wherever the kernels cannot run: on a GPU, in float64, under the compiler.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fastalign.ops import layers, native_library

# By this name transformers' attention layers call it.
ROTARY = "apply_rotary_pos_emb"
GATED = frozenset(("gate_proj", "up_proj", "down_proj", "act_fn"))
TOLERANCE = 1e-5  # of the largest value: some roundings of float32
# Of rows of random numbers: an epsilon shows in small ones, a bound in large ones.
SCALES = (1.0, 1e-3, 30.0)
_CPU = torch.device("cpu")  # a model may be built where tensors are on another, or have no data


def fuse_layers(model: nn.Module) -> None:
    """Have a model's layers compute by the kernels where these are exact and can run."""
    if native_library.unusable_reason("cpu") is not None:
        return
    generator = torch.Generator(_CPU).manual_seed(0)
    with unset_fake_temporarily():  # the random numbers are real where the weights are not
        for module in model.modules():
            found = fused_class(module, generator)
            if found is not None:
                module.__class__ = found


def fused_class(module: nn.Module, generator: torch.Generator) -> type[nn.Module] | None:
    """Return the class that computes a module by a kernel; None: it keeps its own."""
    own: Any = type(module)
    children = {name for name, _ in module.named_children()}
    names = {name for name, _ in module.named_parameters(recurse=False)}
    takes_one = len(inspect.signature(own.forward).parameters) == 2
    if names == {"weight"} and not children and takes_one:
        return norm_class(module, generator)
    if children >= GATED and takes_one:
        return gated_class(module, generator)
    return attention_class(own)


def norm_class(module: Any, generator: torch.Generator) -> type[nn.Module] | None:
    """Return the class of an RMSNorm by the kernel; None: the module is another."""
    own: Any = type(module)
    weight = module.weight
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight.ndim != 1 or weight.dtype != torch.float32 or not isinstance(epsilon, float):
        return None
    x = random_rows(len(weight), generator)
    other = torch.randn(len(weight), generator=generator, device=_CPU)

    def expected(x: Tensor, weight: Tensor) -> Tensor:
        probe = copy_with(module, _parameters={"weight": weight})
        found: Tensor = own.forward(probe, x)
        return found

    for offset in (0.0, 1.0):

        def kernel(x: Tensor, weight: Tensor, offset: float = offset) -> Tensor:
            return layers.rms_norm(x, weight, offset, epsilon)

        if agree(expected, kernel, [x, other]):
            return fused_norm(own, offset, epsilon)
    return None


def gated_class(module: Any, generator: torch.Generator) -> type[nn.Module] | None:
    """Return the class of a gated MLP by the kernel; None: the module is another."""
    own: Any = type(module)
    gate, up = (random_rows(16, generator) for _ in range(2))

    def expected(gate: Tensor, up: Tensor) -> Tensor:
        ends = {"gate_proj": lambda _: gate, "up_proj": lambda _: up, "down_proj": lambda x: x}
        probe = copy_with(module, _modules={**module._modules, **ends})
        found: Tensor = own.forward(probe, gate)
        return found

    for activation in ("silu", "gelu_tanh"):

        def kernel(gate: Tensor, up: Tensor, activation: Any = activation) -> Tensor:
            return layers.gated_activation(gate, up, activation)

        if agree(expected, kernel, [gate, up]):
            return fused_gated(own, activation)
    return None


@cache
def attention_class(own: Any) -> type[nn.Module] | None:
    """Return the class of an attention layer whose rotary embedding is the kernel's, or None.

    Its `forward` is the same code with another function by the name that it calls.
    """
    forward = own.forward
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    original = forward.__globals__.get(ROTARY)
    if original is None or not rotates_halves(original):
        return None

    def apply(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        usable = layers.rotary_usable(q, cos, sin) and layers.rotary_usable(k, cos, sin)
        if others or options or not usable:
            found: tuple[Tensor, Tensor] = original(q, k, cos, sin, *others, **options)
            return found
        return layers.rotary(q, cos, sin), layers.rotary(k, cos, sin)

    names = {**forward.__globals__, ROTARY: apply}
    same_code = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    same_code.__kwdefaults__ = forward.__kwdefaults__
    return subclass(same_code, attention_class, own)


def rotates_halves(original: Callable[..., Any]) -> bool:
    """Return whether a function rotates queries and keys as the kernel does."""
    generator = torch.Generator(_CPU).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=_CPU)

    cos, sin = random(1, 3, 8), random(1, 3, 8)

    def expected(q: Tensor, k: Tensor) -> Tensor:
        found = original(q, k, cos, sin)
        return torch.cat([each.flatten() for each in found])

    def kernel(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat([layers.rotary(each, cos, sin).flatten() for each in (q, k)])

    return agree(expected, kernel, [random(1, 4, 3, 8), random(1, 2, 3, 8)])


@cache
def fused_norm(own: Any, offset: float, epsilon: float) -> type[nn.Module]:
    """Return the subclass of a norm's class that computes by the kernel."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if layers.usable(hidden_states, self.weight):
            return layers.rms_norm(hidden_states, self.weight, offset, epsilon)
        found: Tensor = own.forward(self, hidden_states)
        return found

    return subclass(forward, fused_norm, own, offset, epsilon)


@cache
def fused_gated(own: Any, activation: layers.Activation) -> type[nn.Module]:
    """Return the subclass of a gated MLP's class that computes by the kernel."""

    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        same = gate.dtype == up.dtype and gate.shape == up.shape
        if same and layers.usable(gate, up, dtypes=layers.FLOATS):
            product = layers.gated_activation(gate, up, activation)
        else:
            product = self.act_fn(gate) * up
        found: Tensor = self.down_proj(product)
        return found

    return subclass(forward, fused_gated, own, activation)


def subclass(
    forward: Callable[..., Any], make: Callable[..., Any], own: type[Any], *options: Any
) -> type[nn.Module]:
    """Return a subclass with another `forward` and the same name, by which layers are found.

    Its modules are copied and pickled by the call that made the class, since no module of Python
    holds it: `make(own, *options)`.
    """

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return without_parts, (make, own, *options), self.__getstate__()

    names: dict[str, Any] = {"forward": forward, "__reduce_ex__": reduce}
    names |= {"__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (own,), names)


def without_parts(make: Callable[..., Any], own: type[Any], *options: Any) -> Any:
    """Return a module that a copy or a pickle fills in, of its own class if kernels cannot run."""
    usable = native_library.unusable_reason("cpu") is None
    found: Any = (make(own, *options) if usable else None) or own
    return found.__new__(found)


def copy_with(module: nn.Module, **parts: dict[str, Any]) -> Any:
    """Return a copy of a module that shares all but some of its parts."""
    probe = type(module).__new__(type(module))
    probe.__dict__ = {**module.__dict__, **parts}
    return probe


def random_rows(num_columns: int, generator: torch.Generator) -> Tensor:
    """Return rows of random numbers, each of another scale: (len(SCALES), num_columns)."""
    rows = torch.randn(len(SCALES), num_columns, generator=generator, device=_CPU)
    return rows * torch.tensor(SCALES, device=_CPU)[:, None]


def agree(
    expected: Callable[..., Tensor], kernel: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> bool:
    """Return whether two functions have the same results and gradients, up to rounding."""
    try:
        theirs = with_gradients(expected, inputs)
    except Exception:  # whatever a layer of another form raises
        return False
    ours = with_gradients(kernel, inputs)
    return all(
        a.shape == b.shape and a.dtype == b.dtype and close(a, b)
        for a, b in zip(theirs, ours, strict=True)
    )


def close(expected: Tensor, found: Tensor) -> bool:
    """Return whether each row, or a vector, differs by rounding only."""
    rows = expected.reshape(-1, expected.shape[-1]), found.reshape(-1, found.shape[-1])
    largest = rows[0].abs().amax(-1, keepdim=True)
    return bool(((rows[0] - rows[1]).abs() <= TOLERANCE * largest).all())


def with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return a function's result, and the gradients of its inputs for random ones of the result."""
    with torch.enable_grad():
        leaves = [each.detach().clone().requires_grad_() for each in inputs]
        result = function(*leaves)
        generator = torch.Generator(_CPU).manual_seed(1)
        upstream = torch.randn(result.shape, generator=generator, device=_CPU)
        gradients = torch.autograd.grad(result, leaves, upstream)
    return [result.detach(), *gradients]
