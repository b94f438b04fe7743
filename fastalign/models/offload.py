"""Weights kept in host memory, each layer moved to the device while it is computed."""

from collections.abc import Callable
from typing import Any

import torch


def find_offload() -> Callable[..., Any]:
    """Accelerate's `cpu_offload`.

    Raises:
        ValueError: accelerate is not installed.
    """
    try:
        from accelerate import cpu_offload
    except ImportError as error:
        raise ValueError(
            "reference.offload needs accelerate: pip install 'fastalign[offload]'"
        ) from error
    offload: Callable[..., Any] = cpu_offload
    return offload


def offload_layers(model: Any, device: torch.device) -> None:
    """Makes a model that is in host memory compute on `device`, a layer there at a time.

    The head stays on the device: log-probs are computed from its weight, outside of any layer.
    For inference only; whatever needs all weights at once (a fingerprint, saving) comes before.

    Args:
        model: a causal model from `load_policy`, on the CPU.
        device: where it computes.

    Raises:
        ValueError: accelerate is not installed.
    """
    offload = find_offload()
    if device.type == "cuda":  # pinned memory is copied several times as fast
        for parameter in model.parameters():
            parameter.data = parameter.data.pin_memory()
    layers = sorted(model._no_split_modules or [])
    offload(model.base_model, device, preload_module_classes=layers)
    model.get_output_embeddings().to(device)
