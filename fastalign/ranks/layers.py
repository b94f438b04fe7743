"""The layers that a model is compiled, sharded and estimated by."""

from typing import Any

from torch import nn


def decoder_layers(model: Any, argument: str) -> list[nn.Module]:
    """The layers that transformers marks as such.

    Raises:
        ValueError: there are none; `argument` is what needs them.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{argument}: {type(model).__name__} has no decoder layers that transformers marks"
        )
    return layers
