"""A run's models on fake tensors, and the bytes of their weights."""

from typing import Any

import torch
from torch import nn

from fastalign.compute import Compute
from fastalign.estimate.memory import fake_mode
from fastalign.models import linear_names, model_without_weights
from fastalign.runs.config import AnyConfig
from fastalign.runs.load_models import add_new_adapter, base_dtype, checkpoint_activations
from fastalign.trainers.reward.config import RewardConfig

# A weight in bitsandbytes' doubly quantised NF4: half a byte, one byte of scale per 64 weights, and
# a float32 per 256 scales.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def trained_model(config: AnyConfig, compute: Compute) -> Any:
    """Return the trained model with its adapter, NF4 weights in the dtype of their products.

    Raises:
        ValueError: if the run would refuse the model's settings.
    """
    dtype = base_dtype(config.model, compute)
    model = fake_model(config, compute, config.model.path, dtype, trained=True)
    if config.train.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def reference_model(config: AnyConfig, compute: Compute, path: str) -> Any:
    """Return a frozen model, which is stored in float32."""
    return fake_model(config, compute, path, torch.float32, trained=False)


def fake_model(
    config: AnyConfig, compute: Compute, path: str, stored: torch.dtype, *, trained: bool
) -> Any:
    """Return a model of the run on fake tensors, with the new adapter if it is trained.

    Its dtype is the stored one, or that of the products if it is sharded.
    """
    dtype = compute.dtype if compute.parallel.strategy == "fsdp" else stored
    with torch.device("meta"):  # peft moves its matrices, which fake tensors do not support
        model = model_without_weights(
            path,
            compute,
            reward=isinstance(config, RewardConfig),
            dtype=dtype,
            trust_remote_code=config.model.trust_remote_code,
        )
        if trained:
            add_new_adapter(model, config.model)
    move_to_fake(model, compute.device)
    return model


def move_to_fake(model: nn.Module, device: torch.device) -> None:
    """Replace parameters and buffers by fake tensors on a device; tied ones stay tied."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in model.modules():
        for name, parameter in part.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((part, name))
    with fake_mode(device):
        model.to_empty(device=device)
    for (first, name), *others in owners.values():
        for part, its_name in others:
            setattr(part, its_name, getattr(first, name))


def weight_bytes(model: Any, config: AnyConfig) -> int:
    """Return the bytes of the trained model's parameters and buffers as they will be stored."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    total = float(sum(t.numel() * t.element_size() for t in tensors.values()))
    if config.model.lora.base == "nf4":
        head = model.get_output_embeddings()
        for layer in linear_names(model).values():
            weight: Any = layer.weight
            if weight is not head.weight and not weight.requires_grad:
                total -= weight.numel() * (weight.element_size() - NF4_BYTES)
    return int(total)
