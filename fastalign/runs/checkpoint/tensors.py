"""A run's tensors under one flat set of names, as a checkpoint's shards hold them.

`model.NAME` (what is trained, by `named_parameters()`), `optimizer.NAME.KEY`, `reference.NAME` and
`random.rankR.DEVICE`. A value may be a DTensor, of which each rank holds a part.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from fastalign.runs.state import TrainState, random_state

FORMAT = 2
ROLLOUTS = "rollouts.json"
MODEL = "model."
OPTIMIZER = "optimizer."
REFERENCE = "reference."
RANDOM = "random."


def ignore_missing_group() -> None:
    """Silence DCP's warning about a missing process group, which one process does not need."""
    # Not for a while only: it warns in a thread, and filters are the whole process's.
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")


def trainable_parameters(model: Any) -> dict[str, Tensor]:
    """Return the parameters that a run trains, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def random_name(rank: int, device: str) -> str:
    """Return the checkpoint's name of one rank's random state, e.g. `random.rank0.cpu`."""
    return f"{RANDOM}rank{rank}.{device}"


def described(name: str) -> str:
    """Return a tensor's name in words: `optimizer state of lm_head.weight (exp_avg)`."""
    if name.startswith(MODEL):
        return f"weight of {name.removeprefix(MODEL)}"
    if name.startswith(OPTIMIZER):
        parameter, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
        return f"optimizer state of {parameter} ({key})"
    if name.startswith(REFERENCE):
        return f"reference weight of {name.removeprefix(REFERENCE)}"
    return f"random state of {name.removeprefix(RANDOM)}" if name.startswith(RANDOM) else name


def _apart(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors of which no two share memory, as safetensors requires."""
    seen: set[int] = set()
    for name, value in flat.items():
        if isinstance(value, DTensor):
            continue
        value = value.detach().contiguous()
        address = value.untyped_storage().data_ptr()
        flat[name] = value.clone() if address in seen else value
        seen.add(address)
    return flat


def tensors_of(state: TrainState, rank: int) -> dict[str, Tensor]:
    """Return every tensor that a checkpoint holds of this rank, not copied."""
    flat = {MODEL + name: value for name, value in trainable_parameters(state.model).items()}
    for name, values in optimizer_states(state).items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                flat[f"{OPTIMIZER}{name}.{key}"] = value
    flat |= {REFERENCE + name: value for name, value in state.reference.items()}
    flat |= {random_name(rank, device): value for device, value in random_state().items()}
    return _apart(flat)


def optimizer_states(state: TrainState) -> dict[str, dict[str, Any]]:
    """Return the optimiser's state of every parameter that has one, by the parameter's name."""
    held = state.optimizer.state
    return {name: held[p] for name, p in state.model.named_parameters() if held.get(p)}


def optimizer_settings(state: TrainState) -> dict[str, Any]:
    """Return the optimiser's groups and the numbers in its states, as JSON holds them."""
    names = {p: name for name, p in state.model.named_parameters()}
    groups = [
        {**group, "params": [names[p] for p in group["params"]]}
        for group in state.optimizer.param_groups
    ]
    numbers = {
        name: {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        for name, values in optimizer_states(state).items()
    }
    return {
        "param_groups": groups,
        "numbers": {name: values for name, values in numbers.items() if values},
    }


def owner_of(name: str) -> str | None:
    """Return the parameter that a tensor belongs to, or None for a random state."""
    if name.startswith(OPTIMIZER):
        return name.removeprefix(OPTIMIZER).rpartition(".")[0]
    prefix = next((prefix for prefix in (MODEL, REFERENCE) if name.startswith(prefix)), None)
    return None if prefix is None else name.removeprefix(prefix)


def is_like_owner(name: str) -> bool:
    """Return whether a tensor has its parameter's shape; 8-bit states have shapes of their own."""
    return name.startswith((MODEL, REFERENCE)) or name.endswith((".exp_avg", ".exp_avg_sq"))


def owned_targets(
    stored: Mapping[str, TensorStorageMetadata], parameters: Mapping[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """Return empty tensors for those stored under a prefix, sharded as their parameters are."""
    targets = {}
    for name, found in stored.items():
        if name.startswith(prefix):
            like, dtype = parameters[str(owner_of(name))], found.properties.dtype
            if like.shape == found.size:
                targets[name] = torch.empty_like(like, dtype=dtype)
            else:
                targets[name] = torch.empty(found.size, dtype=dtype, device=like.device)
    return targets


def load_optimizer(
    state: TrainState, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """Load the optimiser's states and its groups' settings, both by the parameters' names.

    Groups that hold other parameters are a ValueError.
    """
    names = {p: name for name, p in state.model.named_parameters()}
    grouped = [[names[p] for p in group["params"]] for group in state.optimizer.param_groups]
    if grouped != [group["params"] for group in settings["param_groups"]]:
        raise ValueError("run.resume: the optimizer's groups of weights are not the checkpoint's")
    places = {name: at for at, name in enumerate(name for group in grouped for name in group)}
    values: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith(OPTIMIZER):
            values.setdefault(places[str(owner_of(name))], {})[name.rpartition(".")[2]] = value
    for name, numbers in settings["numbers"].items():
        values.setdefault(places[name], {}).update(numbers)
    now = state.optimizer.state_dict()["param_groups"]
    groups = []
    for group, saved in zip(now, settings["param_groups"], strict=True):
        kept = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        groups.append({**group, **kept, "params": group["params"]})
    state.optimizer.load_state_dict({"state": values, "param_groups": groups})
