"""Checks of the arguments that all operations on a head share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastalign.ops.backends import check_usable, choose_backend, unusable_reason
from fastalign.ops.head.buffers import default_budget
from fastalign.ops.head.call import HeadCall
from fastalign.ops.head.linear_head import LinearHead, lora_operands
from fastalign.ops.head.products import product_dtype
from fastalign.ops.head.rank_agreement import checked_together
from fastalign.ops.native_library import constant_in_graphs

LinearBackend = Literal["auto", "reference", "torch", "triton", "native", "epilogue"]


def choose_linear_backend(
    operation: str, backend: str, device_type: str, compute_dtype: torch.dtype
) -> Literal["reference", "torch", "triton", "native", "epilogue"]:
    """Return the backend that runs; "auto" takes native, then (on a GPU) Triton, then "torch".

    Without gradients `epilogue_preferred` may have "auto" take "epilogue".

    Raises:
        ValueError: if `backend` is unknown, or a named one cannot run here.
    """
    if backend == "torch":
        return "torch"
    if backend not in get_args(LinearBackend):
        known = ", ".join(repr(name) for name in get_args(LinearBackend))
        raise ValueError(f"backend: expected one of {known}, got {backend!r}")
    if backend == "epilogue":
        check_usable(operation, backend, device_type, compute_dtype)
        return "epilogue"
    chosen = choose_backend(operation, backend, device_type, compute_dtype)
    return "torch" if (backend, chosen) == ("auto", "reference") else chosen


def check_epilogue(operation: str, needs: Sequence[bool], num_heads: int, *, shared: bool) -> None:
    """Check that "epilogue" can run a call: it leaves no logits that could be read again.

    Raises:
        ValueError: if it cannot.
    """
    for refused, where in (
        (any(needs), "where gradients are wanted"),
        (num_heads > 1, "for two heads"),
        (shared, "on a vocabulary's shard"),
    ):
        if refused:
            raise ValueError(
                f"backend: {operation} cannot run with 'epilogue' {where}, "
                "as it keeps no logits: use 'auto'"
            )


@constant_in_graphs
def epilogue_preferred(device: torch.device, compute_dtype: torch.dtype) -> bool:
    """Return True where "epilogue" was measured to be faster than the other backends."""
    if device.type != "cuda" or unusable_reason("epilogue", "cuda", compute_dtype) is not None:
        return False
    from fastalign.ops.triton_table import product_configuration  # Triton may be missing

    return product_configuration(compute_dtype.itemsize, device).preferred


@dataclass(frozen=True)
class HeadOptions:
    """Options of a call that are not fields of its head: see :func:`fastalign.linear_logprob`."""

    temperature: float | Tensor = 1.0
    ignore_index: int = -100
    compute_dtype: torch.dtype | None = None
    max_buffer_bytes: int | None = None
    backend: LinearBackend = "auto"


def check_head(hidden: Tensor, head: LinearHead, targets: Tensor) -> None:
    """Check shapes, dtypes and devices; the weight of a shard may be empty.

    Raises:
        ValueError: if one is wrong, naming the argument, what was expected and what came.
    """
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(
            f"hidden: expected a floating (T, D) tensor, got {hidden.dtype} {tuple(hidden.shape)}"
        )
    weight, bias = head.weight, head.bias
    shaped = weight.ndim == 2 and weight.shape[1] == hidden.shape[1]
    if not shaped or (weight.shape[0] == 0 and head.shard is None):
        raise ValueError(
            f"weight: expected (V, {hidden.shape[1]}) with V > 0, got {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets: expected int64 ({hidden.shape[0]},), got {targets.dtype} "
            f"{tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, value in (("weight", weight), ("targets", targets), ("bias", bias)):
        if value is not None and value.device != hidden.device:
            raise ValueError(
                f"{name}: expected on {hidden.device} as hidden is, got {value.device}"
            )


def check_call(
    operation: str,
    hidden: Tensor,
    head: LinearHead,
    targets: Tensor,
    options: HeadOptions,
    *,
    return_entropy: bool = True,
    num_heads: int = 1,
) -> HeadCall:
    """Return the checked arguments of one call on this process.

    Args:
        operation: name of the public function, for messages.
        hidden: (T, D) hidden states.
        head: head, or this rank's shard of it.
        targets: (T,) token ids.
        options: options of the call.
        return_entropy: True if entropies are wanted.
        num_heads: heads whose logits share the default budget.

    Raises:
        ValueError: if an argument is wrong, or the backend cannot run here.
    """
    shard, weight, device = head.shard, head.weight, hidden.device
    if shard is not None:
        shard.check(weight)
    check_head(hidden, head, targets)
    vocab_size = weight.shape[0] if shard is None else shard.vocab_size
    check_targets(targets, vocab_size, options.ignore_index)
    check_transform(head.softcap, head.logit_scale)
    dtype = resolve_compute_dtype(hidden, weight, options.compute_dtype)
    temperature = temperature_tensor(options.temperature, hidden)
    backend = choose_linear_backend(operation, options.backend, device.type, dtype)
    if shard is not None and backend == "reference":
        raise ValueError(
            f"backend: {operation} cannot run with 'reference' on a vocabulary's shard, as it "
            "needs every logit on one rank: use 'torch', which is PyTorch as well"
        )
    lora = lora_operands(head.lora, hidden, weight, dtype)
    leaves = (hidden, weight, head.bias, *lora)
    enabled = torch.is_grad_enabled()
    needs = [enabled and leaf is not None and leaf.requires_grad for leaf in leaves]
    if backend == "epilogue":
        check_epilogue(operation, needs, num_heads, shared=shard is not None)
    elif options.backend == "auto" and not any(needs) and num_heads == 1 and shard is None:
        backend = "epilogue" if epilogue_preferred(device, dtype) else backend
    budget = options.max_buffer_bytes
    if budget is None:
        columns = num_heads * weight.shape[0] if shard is None else shard.num_planned_columns
        # Ranks have to plan the same tiles, and might see different free memory.
        budget = default_budget(columns, dtype, device, within_free_memory=shard is None)
    return HeadCall(
        hidden,
        weight,
        head.bias,
        targets,
        temperature,
        *lora,
        head.softcap,
        float(head.logit_scale),
        options.ignore_index,
        dtype,
        budget,
        needs,
        return_entropy,
        backend,
    )


def check_call_on_ranks(
    check: Callable[[], HeadCall],
    head: LinearHead,
    options: HeadOptions,
    more: Callable[[], dict[str, Any]] = dict,
) -> HeadCall:
    """Return what `check` returns, once all ranks of the head's group have agreed.

    Args:
        check: `check_call` with this rank's arguments.
        head: this rank's shard.
        options: options of the call.
        more: checks what is left, and returns what of it must be the same on every rank.

    Raises:
        ValueError: if `check` raises on any rank, or the ranks' arguments differ.
    """
    shard, lora = head.shard, head.lora
    assert shard is not None

    def checked() -> tuple[HeadCall, dict[str, Any]]:
        call, temperature = check(), options.temperature
        # the values of a tensor may be on a GPU, which is not waited for
        values = (
            f"a tensor {tuple(temperature.shape)}"
            if isinstance(temperature, Tensor)
            else str(float(temperature))
        )
        rank = None if lora is None else f"rank {lora.lora_A.shape[0]}, scaling {lora.scaling}"
        device_type = call.hidden.device.type
        facts = {
            "hidden.shape": tuple(call.hidden.shape),
            "vocab_size": shard.vocab_size,
            "largest": shard.num_planned_columns,
            "temperature": values,
            "softcap": call.softcap,
            "logit_scale": call.logit_scale,
            "ignore_index": call.ignore_index,
            "lora": str(rank),
            "compute_dtype": str(call.compute_dtype),
            "the products' dtype": str(product_dtype(call.compute_dtype, device_type)),
            "max_buffer_bytes": call.max_buffer_bytes,
            "backend": call.backend,
            "the gradients wanted": call.wanted,
        }
        return call, {**facts, **more()}

    return checked_together(shard, checked)


def check_targets(targets: Tensor, num_columns: int, ignore_index: int) -> None:
    """Check, on a CPU, that targets are in range.

    A GPU would have to be waited for: there the log-prob of such a target is NaN.

    Raises:
        ValueError: if one is not, naming its row.
    """
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = ((targets < 0) | (targets >= num_columns)) & (targets != ignore_index)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"targets: expected 0..{num_columns - 1} or {ignore_index} (ignored), "
            f"got {int(targets[row])} at row {row}"
        )


def resolve_compute_dtype(
    hidden: Tensor, weight: Tensor, compute_dtype: torch.dtype | None
) -> torch.dtype:
    """Return the products' dtype: as given, or autocast's where it is on, or the operands' own.

    Raises:
        ValueError: if none is given and the operands differ, or it is not a float dtype.
    """
    if compute_dtype is not None:
        if not compute_dtype.is_floating_point or compute_dtype.itemsize < 2:
            raise ValueError(
                "compute_dtype: expected bfloat16, float16, float32 or float64, "
                f"got {compute_dtype}"
            )
        return compute_dtype
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            "compute_dtype: expected one to be given, got None, and "
            f"hidden is {hidden.dtype}, weight {weight.dtype}"
        )
    return hidden.dtype


def check_transform(softcap: float | None, logit_scale: float) -> None:
    """Check the numbers of the logit transform.

    Raises:
        ValueError: if one is not positive.
    """
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    if not logit_scale > 0:
        raise ValueError(f"logit_scale: expected a positive number, got {logit_scale}")


def temperature_tensor(temperature: float | Tensor, hidden: Tensor) -> Tensor | None:
    """Return None for 1.0; else a tensor of one element, or of one per row.

    Raises:
        ValueError: if a number is not positive or cannot be held in float32 (float64 of such hidden
            states), or a tensor has another shape or needs a gradient.
    """
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 and temperature.shape != hidden.shape[:1]:
            raise ValueError(
                f"temperature: expected a number or ({hidden.shape[0]},), "
                f"got {tuple(temperature.shape)}"
            )
        if temperature.requires_grad:
            raise ValueError("temperature: expected no gradient, got a tensor that requires one")
        return temperature.reshape(-1).to(hidden.device)
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if temperature == 1.0:
        return None
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    limits = torch.finfo(dtype)
    if not limits.tiny <= temperature <= limits.max:
        raise ValueError(
            f"temperature: expected a number from {limits.tiny:.1e} to {limits.max:.1e}, "
            f"got {temperature}"
        )
    return torch.full((1,), temperature, dtype=dtype, device=hidden.device)
