"""Reference log-probs, computed once and kept on disk: training then never runs the reference.

A cache file is keyed by everything the numbers depend on: the examples' token ids, the reference's
weights and configuration, the dtype of the products. A change in any of them is another file.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastalign.evaluation import sequence_logprobs
from fastalign.models import base_state
from fastalign.trainers.step import Compute, Examples

VERSION = 1
# Examples between two writes: what was computed is kept even if the run is stopped in between.
PIECE = 4096


def default_cache_dir() -> Path:
    """`fastalign/reference_logprob` in the user's cache folder (XDG_CACHE_HOME)."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "fastalign" / "reference_logprob"


def model_fingerprint(model: Any) -> str:
    """SHA-256 of the configuration and every weight's name, shape, dtype and bytes.

    An adapter is left out: runs with different ones share what they compute of their base.
    """
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, value in sorted(base_state(model).items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        flat = value.detach().cpu().contiguous().flatten()  # a view as bytes needs a dimension
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cache_key(model: Any, data_fingerprint: str, compute: Compute) -> str:
    """The name of the cache file for these examples under this model."""
    parts = [VERSION, data_fingerprint, model_fingerprint(model), str(compute.dtype)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_cache(path: Path, num_examples: int, num_responses: int) -> Tensor:
    """(num_examples, num_responses) float32, NaN where nothing is known; all NaN without a file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return torch.full((num_examples, num_responses), torch.nan)
    try:
        with safe_open(path, framework="pt") as file:
            values: Tensor = file.get_tensor("logprob")
            digest = file.metadata()["sha256"]
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged cache of reference log-probs; delete it") from error
    if digest != hashlib.sha256(values.numpy().tobytes()).hexdigest():
        raise ValueError(
            f"{path}: damaged cache of reference log-probs (its hash differs); delete it"
        )
    assert values.shape == (num_examples, num_responses), "the key covers the examples"
    return values


def write_cache(path: Path, values: Tensor) -> None:
    """Writes aside and renames, so that a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    save_file({"logprob": values}, aside, metadata={"sha256": digest})
    aside.replace(path)


def reference_logprobs(
    model: Any,
    examples: Examples,
    indices: Iterable[int],
    compute: Compute,
    *,
    data_fingerprint: str,
    cache_dir: Path,
) -> Tensor:
    """Sequence log-probs of pairs under the reference, from the cache as far as it has them.

    Args:
        model: the reference.
        examples: pairs.
        indices: the examples that the run will use; the others may stay NaN.
        compute: how forwards are run.
        data_fingerprint: of the examples' token ids.
        cache_dir: where cache files are.

    Returns:
        (number of examples, 2) float32 on the CPU.

    Raises:
        ValueError: a damaged cache file, or a log-prob that is not finite.
    """
    path = cache_dir / f"{cache_key(model, data_fingerprint, compute)}.safetensors"
    values = read_cache(path, len(examples.groups), 2)
    wanted = sorted(set(indices))
    missing = [i for i in wanted if bool(values[i].isnan().any())]
    num_cached = len(wanted) - len(missing)
    print(f"reference log-probs: {num_cached} cached, {len(missing)} to compute", flush=True)
    for start in range(0, len(missing), PIECE):
        part = missing[start : start + PIECE]
        logprobs = sequence_logprobs(
            model,
            [examples.groups[i] for i in part],
            packing=compute.packing,
            tokens_per_batch=compute.tokens_per_batch,
            dtype=compute.dtype,
            max_buffer_bytes=compute.max_buffer_bytes,
        )
        values[part] = torch.stack(logprobs)
        bad = [i for i in part if not bool(values[i].isfinite().all())]
        if bad:
            raise ValueError(
                f"reference: the log-probs of {len(bad)} pairs are not finite (the first is "
                f"number {bad[0]}): the reference model is damaged"
            )
        write_cache(path, values)
    return values
