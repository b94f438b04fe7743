"""Checks of the arguments that `linear_logprob` and `fused_linear_loss` share."""

from typing import Literal, get_args

import torch
from torch import Tensor

from fastalign.ops.backends import choose_backend
from fastalign.ops.head.buffers import default_budget

LinearBackend = Literal["auto", "reference", "torch", "triton", "native"]


def choose_linear_backend(
    operation: str, backend: str, device_type: str, compute_dtype: torch.dtype
) -> Literal["reference", "torch", "triton", "native"]:
    """The backend that runs; "auto" takes native, then (on a GPU) Triton, then "torch".

    Raises:
        ValueError: `backend` is unknown, or a named one cannot run here.
    """
    if backend == "torch":
        return "torch"
    if backend not in get_args(LinearBackend):
        known = ", ".join(repr(name) for name in get_args(LinearBackend))
        raise ValueError(f"backend: expected one of {known}, got {backend!r}")
    chosen = choose_backend(operation, backend, device_type, compute_dtype)
    return "torch" if (backend, chosen) == ("auto", "reference") else chosen


def resolve_budget(max_buffer_bytes: int | None, weight: Tensor, compute_dtype: torch.dtype) -> int:
    """The budget for this head's tiles: as asked, or the default."""
    if max_buffer_bytes is None:
        return default_budget(weight.shape[0], compute_dtype, weight.device)
    return max_buffer_bytes


def check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    empty_shard: bool = False,
) -> None:
    """Checks shapes, dtypes and devices; the weight may be an empty shard where that is said.

    Raises:
        ValueError: With the argument, what was expected and what came.
    """
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(
            f"hidden: expected a floating (T, D) tensor, got {hidden.dtype} {tuple(hidden.shape)}"
        )
    shaped = weight.ndim == 2 and weight.shape[1] == hidden.shape[1]
    if not shaped or (weight.shape[0] == 0 and not empty_shard):
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


def check_targets(targets: Tensor, num_columns: int, ignore_index: int) -> None:
    """On a CPU, checks that targets are in range; a GPU's own indexing check does it there.

    Raises:
        ValueError: Naming the first bad row.
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
    """The products' dtype: as asked, or autocast's where it is on, or the operands' own.

    Raises:
        ValueError: Nothing is asked and the operands differ, or it is not a float dtype.
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
    """Checks the numbers of the logit transform.

    Raises:
        ValueError: One is not positive.
    """
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    if not logit_scale > 0:
        raise ValueError(f"logit_scale: expected a positive number, got {logit_scale}")


def temperature_tensor(temperature: float | Tensor, hidden: Tensor) -> Tensor | None:
    """None for 1.0; else a tensor of one element, or of one per row.

    Raises:
        ValueError: A number that is not positive, or a tensor of another shape.
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
    return torch.full((1,), temperature, dtype=dtype, device=hidden.device)
