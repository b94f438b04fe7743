"""The model of a run on tensors without data, and what its weights take."""

from typing import Any

import torch
from torch import nn

from fastalign.compute import Compute
from fastalign.estimate.memory import fake_mode
from fastalign.models import linear_names, model_without_weights
from fastalign.runs.config import AnyConfig
from fastalign.runs.load_models import add_new_adapter, base_dtype, checkpoint_activations
from fastalign.trainers.reward.config import RewardConfig

# A weight of bitsandbytes' doubly quantised NF4: half a byte, a byte of scale for each 64 of them,
# and a float32 for each 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def trained_model(config: AnyConfig, compute: Compute) -> Any:
    """What the run trains, adapter included; weights of NF4 are in the dtype of its products.

    Of a sharded one all weights are: it computes with those that are gathered.

    Raises:
        ValueError: whatever the run would refuse of it.
    """
    dtype = gathered_dtype(compute, base_dtype(config.model, compute))
    model = build(config, compute, config.model.path, dtype=dtype, trained=True)
    if config.train.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def reference_model(config: AnyConfig, compute: Compute, path: str) -> Any:
    """Another model in float32, frozen; a sharded one as it is gathered."""
    dtype = gathered_dtype(compute, torch.float32)
    return build(config, compute, path, dtype=dtype, trained=False)


def gathered_dtype(compute: Compute, kept: torch.dtype) -> torch.dtype:
    """Of the weights that a model computes with, which a rank keeps in `kept`."""
    return compute.dtype if compute.parallel.strategy == "fsdp" else kept


def build(
    config: AnyConfig, compute: Compute, path: str, *, dtype: torch.dtype, trained: bool
) -> Any:
    """A model of the run, the new adapter on it if it is the trained one."""
    with torch.device("meta"):  # peft moves its matrices, which fake tensors do not bear
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
    """Gives parameters and buffers a device, and no data; those that were tied stay so."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in model.modules():
        for name, parameter in part.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((part, name))
    with fake_mode(device):
        model.to_empty(device=device)
    for (first, name), *others in places.values():
        for part, its_name in others:
            setattr(part, its_name, getattr(first, name))


def weight_bytes(model: Any, config: AnyConfig) -> int:
    """Of the trained model's parameters and buffers, once each, as they will be kept."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    total = float(sum(t.numel() * t.element_size() for t in tensors.values()))
    if config.model.lora.base == "nf4":
        head = model.get_output_embeddings()
        for layer in linear_names(model).values():
            weight: Any = layer.weight
            if weight is not head.weight and not weight.requires_grad:
                total -= weight.numel() * (weight.element_size() - NF4_BYTES)
    return int(total)
