"""Models that stay as they are beside the trained one: a reference, a teacher."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from fastalign.compute import Compute
from fastalign.data.tokenizer import Tokenizer, check_same_vocabulary
from fastalign.models.layers import find_offload, offload_layers
from fastalign.models.load import model_fingerprint
from fastalign.runs.config import ModelConfig
from fastalign.runs.inputs import load_model, share


@dataclass(frozen=True)
class FrozenModel:
    """A frozen model beside the trained one.

    Attributes:
        model: the model.
        fingerprint: hash of its configuration and weights.
    """

    model: Any
    fingerprint: str


def load_frozen(
    section: str,
    path: str,
    config: ModelConfig,
    tokenizer: Tokenizer,
    compute: Compute,
    *,
    offload: bool = False,
) -> FrozenModel:
    """Load a model that stays as it is, and share it among the ranks.

    Args:
        section: section of the settings that names it, for messages.
        path: its folder or hub name.
        config: settings of the trained model.
        tokenizer: that of the trained model, whose tokens this one must have.
        compute: device, dtype and ranks.
        offload: keep its weights in host memory, and move its layers one by one.

    Raises:
        ValueError: if its vocabulary is another one, or a library is missing.
    """
    if offload:
        find_offload(f"{section}.offload")  # a missing library is reported before weights are read
    host = replace(compute, device=torch.device("cpu"))
    model, its_tokenizer = load_model(path, config, host if offload else compute)
    check_same_vocabulary(tokenizer, its_tokenizer, f"{section}.path")
    share(model.requires_grad_(False), compute)
    found = FrozenModel(model, model_fingerprint(model))
    if offload:
        offload_layers(model, compute.device)
    return found
