"""The frozen model that a policy is held near: computed once, checked when used again."""

import fcntl
import hashlib
import json
import math
import random
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastalign.compute import Compute, memory_used_in
from fastalign.data.tokenizer import Tokenizer
from fastalign.models.forward import ROUNDING, check_same_start, sequence_logprobs
from fastalign.models.load import model_fingerprint
from fastalign.models.lora import as_reference
from fastalign.progress import phase
from fastalign.runs.accumulate import Examples
from fastalign.runs.config import ReferencedConfig
from fastalign.runs.frozen import FrozenModel, load_frozen
from fastalign.written_files import cache_folder, write_atomically

# Examples between two writes: what was computed is kept even if the run is stopped in between.
PIECE = 4096
NUM_CHECKED = 4


def load_reference(
    config: ReferencedConfig, policy: Any, tokenizer: Tokenizer, compute: Compute
) -> FrozenModel:
    """Load another model, or take the policy before its first step, or its adapter's base.

    Raises:
        ValueError: if its vocabulary is not the policy's, or a library is missing.
    """
    path, offload = config.reference.path, config.reference.offload
    if path is None:
        return FrozenModel(policy, model_fingerprint(policy))
    return load_frozen("reference", path, config.model, tokenizer, compute, offload=offload)


def compute_logprobs(
    reference: FrozenModel, examples: Examples, indices: Sequence[int], compute: Compute
) -> Tensor:
    """Return the reference's sequence log-probs, (number of indices, 2) float32 on the CPU."""
    what = f"the reference's log-probs, in batches of at most {compute.tokens_per_batch} tokens"
    with memory_used_in(what), as_reference(reference.model):
        groups = [examples.groups[i] for i in indices]
        return torch.stack(sequence_logprobs(reference.model, groups, compute))


def check_start(policy: Any, examples: Examples, values: Tensor, compute: Compute) -> None:
    """Compare the policy, which has taken no step, with the reference that it is, on a few pairs.

    All ranks call this. `values` are the reference's log-probs, (number of examples, 2).

    Raises:
        ValueError: if they differ by more than rounding.
    """
    known = torch.nonzero(~values.isnan().any(1))[:NUM_CHECKED, 0].tolist()
    groups = [examples.groups[i] for i in known]
    found = torch.cat(sequence_logprobs(policy, groups, compute))
    counts = [len(group.target_positions(side)) for group in groups for side in (0, 1)]
    check_same_start(found, values[known].flatten(), counts, compute)


def check_cached(
    path: Path,
    values: Tensor,
    cached: Sequence[int],
    reference: FrozenModel,
    examples: Examples,
    compute: Compute,
) -> int:
    """Compute the first, the last and a few other cached pairs again; return how many.

    Raises:
        ValueError: if a value differs from the file's by more than rounding.
    """
    chosen = {cached[0], cached[-1]} if cached else set()
    rest = [i for i in cached if i not in chosen]
    sampled = random.Random(path.name).sample(rest, min(len(rest), NUM_CHECKED - len(chosen)))
    checked = sorted(chosen.union(sampled))
    if not checked:
        return 0
    again = compute_logprobs(reference, examples, checked, compute)
    for i, found in zip(checked, again, strict=True):
        for side, name in enumerate(("chosen", "rejected")):
            allowed = ROUNDING[compute.dtype] * math.sqrt(
                len(examples.groups[i].target_positions(side))
            )
            kept, new = values[i, side].item(), found[side].item()
            if not abs(new - kept) <= allowed:
                raise ValueError(
                    f"{path}: the reference log-prob of pair {i} ({name}) is {kept:.6g} there, "
                    f"computed again it is {new:.6g} (rounding explains {allowed:.2g}); either "
                    "this installation or the one that wrote the file computes it wrongly; delete "
                    "the file to have it computed here"
                )
    return len(checked)


def reference_logprobs(
    reference: FrozenModel,
    examples: Examples,
    indices: Iterable[int],
    compute: Compute,
    *,
    data_fingerprint: str,
    cache_dir: Path,
) -> Tensor:
    """Return sequence log-probs of pairs under the reference, cached ones from the cache.

    The cache is rank 0's; several ranks share what is to be computed.

    A damaged file is renamed and computed again. A cache that cannot be written is reported once,
    and the run goes on with what it computed: hours of a reference's work are not thrown away
    because they cannot be kept for the next run.

    `indices` are the examples that the run will use; the others may stay NaN.

    Returns:
        (number of examples, 2) float32 on the CPU.

    Raises:
        ValueError: if a cached value is not the reference's, or a log-prob is not finite.
    """
    path = cache_path(cache_dir, data_fingerprint, reference.fingerprint, compute.dtype)
    world = compute.world
    values, fault = world.first_does(lambda: read_cache(path, len(examples.groups)))
    if fault is not None:
        print(
            f"{path}: damaged cache of reference log-probs ({fault}); it is renamed "
            f"{damaged_path(path).name} and computed again"
        )
    wanted = sorted(set(indices))
    unknown = values.isnan().any(1).tolist()
    missing = [i for i in wanted if unknown[i]]
    cached = [i for i in wanted if not unknown[i]]
    num_checked = check_cached(path, values, cached, reference, examples, compute)
    print(
        f"reference log-probs: {len(cached)} cached, {len(missing)} to compute"
        + (f"; {num_checked} of the cached ones were computed again and agree" if cached else "")
    )
    with phase("reference log-probs", 2 * len(missing), "responses"):
        compute_missing(reference, examples, missing, compute, values, path)
    return values


def compute_missing(
    reference: FrozenModel,
    examples: Examples,
    missing: Sequence[int],
    compute: Compute,
    values: Tensor,
    path: Path,
) -> None:
    """Compute the log-probs of these pairs, piece by piece, into `values` and the cache at `path`.

    `values` are (number of examples, 2); those that another run has written by then are taken.

    Raises:
        ValueError: if a log-prob is not finite.
    """
    kept = True
    for start in range(0, len(missing), PIECE):
        part = missing[start : start + PIECE]
        values[part] = compute_logprobs(reference, examples, part, compute)
        bad = [i for i in part if not bool(values[i].isfinite().all())]
        if bad:
            raise ValueError(
                f"reference: the log-probs of {len(bad)} pairs are not finite (the first is "
                f"number {bad[0]}): the reference model is damaged"
            )
        if not kept:
            continue
        try:
            values.copy_(compute.world.first_does(partial(merge_into_cache, path, values)))
        except OSError as error:
            kept = False
            print(f"reference log-probs are not kept for later runs: {error}")


VERSION = 1


def default_cache_dir() -> Path:
    """Return the folder of reference log-probs in the user's cache folder."""
    return cache_folder("reference_logprob")


def cache_path(
    cache_dir: Path, data_fingerprint: str, fingerprint: str, dtype: torch.dtype
) -> Path:
    """Return the cache file of these examples under the model with that fingerprint."""
    parts = [VERSION, data_fingerprint, fingerprint, str(dtype)]
    return cache_dir / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.safetensors"


def digest_of(values: Tensor) -> str:
    """Return the SHA-256 of the values' bytes."""
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def read_cache(path: Path, num_examples: int) -> tuple[Tensor, str | None]:
    """Read a cache file.

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


def damaged_path(path: Path) -> Path:
    """Return the path that a damaged file is renamed to."""
    return path.with_name(f"{path.name}.damaged")


def merge_into_cache(path: Path, values: Tensor) -> Tensor:
    """Merge values into the file under a lock, so that simultaneous runs lose nothing.

    The first value written stays: what a run was given is what it finds again when it is resumed.

    `values` are (number of examples, 2) float32, NaN where nothing is known. A damaged file is
    renamed first.

    Returns:
        Values that the file now holds.

    Raises:
        OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        there, fault = read_cache(path, len(values))
        if fault is not None:
            path.replace(damaged_path(path))
        merged = torch.where(there.isnan(), values, there)
        content = save({"logprob": merged}, metadata={"sha256": digest_of(merged)})
        write_atomically(path, content)
    return merged
