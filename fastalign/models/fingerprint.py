"""The fingerprint of a model: a hash of its configuration and weights."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from fastalign.models import base_state
from fastalign.ranks.whole_weights import whole


def model_fingerprint(model: Any) -> str:
    """SHA-256 of the configuration and every weight's name, shape, dtype and bytes.

    A sharded model has that of the whole one, which all its ranks must ask for. An adapter is left
    out: runs with different ones share what they compute of their base.
    """
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, value in sorted(base_state(model).items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        plain: Tensor = whole(value.detach()).cpu().contiguous()
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_or_none(model: Any) -> str | None:
    """Return `model_fingerprint(model)`, or None if there is no model."""
    return None if model is None else model_fingerprint(model)
