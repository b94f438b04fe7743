"""Files of reference log-probs: named by what the numbers depend on, written by several runs.

The name is a hash of the examples' token ids (and so of the data, the tokenizer, the chat template
and `data.max_length`), the reference's weights and configuration (transformers' version is in it)
and the dtype of the products. A change in any of them is another file. The loss and its parameters
are not among them, nor are packing, kernel and device, which only round differently.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastalign.models import base_state, whole
from fastalign.trainers.checkpoint_files import write_bytes_atomically

VERSION = 1


def default_cache_dir() -> Path:
    """`fastalign/reference_logprob` in the user's cache folder (XDG_CACHE_HOME)."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "fastalign" / "reference_logprob"


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


def cache_path(
    cache_dir: Path, data_fingerprint: str, fingerprint: str, dtype: torch.dtype
) -> Path:
    """The cache file of these examples under the model with that fingerprint."""
    parts = [VERSION, data_fingerprint, fingerprint, str(dtype)]
    return cache_dir / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.safetensors"


def digest_of(values: Tensor) -> str:
    """SHA-256 of the values' bytes."""
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def read_cache(path: Path, num_examples: int) -> tuple[Tensor, str | None]:
    """What a cache file knows, and what is wrong with the file.

    Returns:
        (num_examples, 2) float32, NaN where nothing is known, which is everywhere without a file
        or with a damaged one; and the damage, or None.
    """
    nothing = torch.full((num_examples, 2), torch.nan)
    if not path.exists():
        return nothing, None
    try:
        with safe_open(path, framework="pt") as file:
            values: Tensor = file.get_tensor("logprob")
            digest = (file.metadata() or {}).get("sha256")
    except SafetensorError as error:
        return nothing, str(error)
    if digest != digest_of(values):
        return nothing, "its hash differs"
    if values.shape != nothing.shape or values.dtype != nothing.dtype:
        return nothing, f"it holds {tuple(values.shape)} {values.dtype} values"
    return values, None


def put_aside(path: Path) -> Path:
    """Where a damaged file goes."""
    return path.with_name(f"{path.name}.damaged")


def merge_into_cache(path: Path, values: Tensor) -> Tensor:
    """Adds what the file does not know yet, so that runs at the same time lose nothing.

    The first value written stays: what a run was given is what it finds again when it is resumed.

    Args:
        path: the cache file; a damaged one is renamed first.
        values: (number of examples, 2) float32, NaN where nothing is known.

    Returns:
        What the file now holds.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        there, fault = read_cache(path, len(values))
        if fault is not None:
            path.replace(put_aside(path))
        merged = torch.where(there.isnan(), values, there)
        content = save({"logprob": merged}, metadata={"sha256": digest_of(merged)})
        write_bytes_atomically(path, content)
    return merged
