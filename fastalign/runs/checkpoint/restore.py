"""Resume a run from its newest checkpoint without a fault, on any number of ranks.

`checkpoint/writer.py` says what a checkpoint holds.
"""

import json
import random
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from fastalign.ranks.world import ALONE, World
from fastalign.runs.checkpoint.writer import (
    CHECKPOINTS,
    FORMAT,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    RANDOM,
    REFERENCE,
    ROLLOUTS,
    SHARD,
    STATE,
    ignore_missing_group,
    list_checkpoints,
    random_name,
)
from fastalign.runs.config import Part, RunConfig
from fastalign.runs.folder import never_saved
from fastalign.runs.inputs import Parts, changed_inputs
from fastalign.runs.metrics import METRICS, SAMPLES, KeptLines
from fastalign.runs.state import (
    TrainState,
    random_state,
    restore_random_state,
    seed_everything,
    trainable_parameters,
)
from fastalign.written_files import fault_of_file


def resume(
    run: RunConfig, state: TrainState, inputs: Mapping[str, Parts], world: World = ALONE
) -> dict[str, KeptLines]:
    """Restore the newest good checkpoint; print which newer ones are damaged.

    A run that never saved begins at its first step. `inputs` are what training begins from, as
    `runs.inputs.fingerprints` returns them.

    Returns:
        What the checkpoint knows of `metrics.jsonl` and `samples.jsonl`, by their names.

    Raises:
        ValueError: if there is no good checkpoint, or it was made from other inputs.
    """
    if run.export is None and world.of_first(never_saved(Path(run.dir))):
        return {}
    checkpoint, faults = newest_good_checkpoint(Path(run.dir) / CHECKPOINTS, world)
    for fault in faults if world.is_first else ():
        print(f"damaged checkpoint passed over: {fault}")
    saved = read_state(checkpoint)
    changed = changed_inputs(saved, inputs)
    refused = [name for name in changed if name not in run.accept_changed]
    if refused:
        which = ", the ".join(changed[name] for name in refused)
        raise ValueError(
            f"run.resume: the {which} {'is' if len(refused) == 1 else 'are'} not what {checkpoint} "
            f"was trained on; "
            f"--run.accept-changed {' '.join(refused)} goes on with it all the same"
        )
    if world.is_first:
        say_how_inputs_differ(checkpoint, saved, changed)
    restore(checkpoint, state, world, seed=run.seed, afresh=run.start_afresh)
    if world.is_first:
        print(f"resumed from {checkpoint}")
    kept: dict[str, KeptLines] = {}
    for file in (METRICS, SAMPLES):
        lines = KeptLines.of_counters(file, saved)
        if lines is not None and "metrics" in run.start_afresh:
            size = whole_lines(Path(run.dir) / file, lines.num_bytes)
            lines = KeptLines(size, lines.unwritten)
        if lines is not None:
            kept[file] = lines
    return kept


def say_how_inputs_differ(
    checkpoint: Path, saved: Mapping[str, Any], changed: Mapping[str, str]
) -> None:
    """Print which inputs are others than those of the checkpoint, and which cannot be compared."""
    if changed:
        print(f"goes on with another {', another '.join(changed.values())}")
    if "inputs" not in saved:
        print(
            f"{checkpoint} is of an earlier version: only its data and frozen models are compared "
            "with what is there now, not the other inputs"
        )


def whole_lines(path: Path, num_bytes: int) -> int:
    """Return the bytes of the whole lines among the first `num_bytes` of a file."""
    there = path.read_bytes()[:num_bytes] if path.exists() else b""
    return there.rfind(b"\n") + 1


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read `state.json` of a checkpoint without a fault; raise ValueError for another format."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise ValueError(
            f"run.resume: {checkpoint}: expected checkpoint format {FORMAT}, got "
            f"{state.get('format')!r}"
        )
    return state


def stored_tensors(reader: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    """Return every tensor that the shards hold whole; DCP would ignore a missing part."""
    found: dict[str, TensorStorageMetadata] = {}
    for name, value in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(value, TensorStorageMetadata)
        if sum(chunk.sizes.numel() for chunk in value.chunks) == value.size.numel():
            found[name] = value
    return found


def check_parts(
    checkpoint: Path,
    listed: Collection[str],
    stored: Mapping[str, TensorStorageMetadata],
    parameters: Mapping[str, Tensor],
    afresh: Collection[Part],
) -> None:
    """Compare the shards with the list in `state.json` and with the model.

    Raises:
        ValueError: if a part is missing, unknown, or of another shape.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(f"run.resume: checkpoint {checkpoint} {what}")

    parts: dict[str, Part] = {OPTIMIZER: "optimizer", RANDOM: "random"}
    for name in sorted(set(listed) - stored.keys()):
        part = next((part for prefix, part in parts.items() if name.startswith(prefix)), None)
        if part is None:
            raise refuse(f"has no {described(name)}, which its {STATE} lists")
        if part not in afresh:
            raise refuse(
                f"has no {described(name)}; --run.start-afresh {part} begins that part anew"
            )
    for name in sorted(stored.keys() - set(listed)):
        raise refuse(f"holds {described(name)}, which its {STATE} does not list")
    for name in parameters:
        if MODEL + name not in stored:
            raise refuse(f"has no weight of {name}, which the model has")
    for name, found in stored.items():
        owner = owner_of(name)
        if owner is None or (name.startswith(OPTIMIZER) and "optimizer" in afresh):
            continue
        if owner not in parameters:
            raise refuse(f"holds {described(name)}, which the run does not train")
        expected = parameters[owner].shape
        if is_like_owner(name) and found.size != expected:
            what = f"holds {described(name)} as {tuple(found.size)}, expected {tuple(expected)}"
            raise refuse(what)


def restore(
    checkpoint: Path,
    state: TrainState,
    world: World = ALONE,
    *,
    seed: int = 0,
    afresh: Collection[Part] = (),
) -> dict[str, Any]:
    """Load a checkpoint without a fault into `state`; return its `state.json`.

    `state` has the run's model and optimiser, sharded or not, on any number of ranks. The parts
    `afresh` are not read; `seed`, the run's, is for random states that the checkpoint does not
    have.

    Raises:
        ValueError: if a part is missing, or is not of this run.
    """
    saved = read_state(checkpoint)
    reader = HuggingFaceStorageReader(str(checkpoint))
    stored = stored_tensors(reader)
    parameters = trainable_parameters(state.model)
    check_parts(checkpoint, saved["tensors"], stored, parameters, afresh)
    wanted = {
        **{MODEL + name: value for name, value in parameters.items()},
        **({} if "optimizer" in afresh else owned_targets(stored, parameters, OPTIMIZER)),
        **owned_targets(stored, parameters, REFERENCE),
        **({} if "random" in afresh else random_targets(stored, world.rank)),
    }
    load_tensors(wanted, reader, world)
    if "optimizer" not in afresh:
        load_optimizer(state, wanted, saved["optimizer"])
    state.reference = {
        name.removeprefix(REFERENCE): value
        for name, value in wanted.items()
        if name.startswith(REFERENCE)
    }
    restore_counters(checkpoint, state, saved, afresh)
    restore_random(wanted, state.step, seed, world.rank)
    print_resume_differences(saved, stored, world, afresh)
    return saved


def restore_weights(checkpoint: Path, model: Any, world: World = ALONE) -> None:
    """Load a checkpoint's trained weights alone, sharded or not; all ranks call this.

    Raises:
        ValueError: if it has a fault, or lacks a weight.
    """
    fault = fault_of(checkpoint, world)
    if fault is not None:
        raise ValueError(f"{checkpoint}: {fault}")
    read_state(checkpoint)
    reader = HuggingFaceStorageReader(str(checkpoint))
    stored = stored_tensors(reader)
    wanted = {MODEL + name: value for name, value in trainable_parameters(model).items()}
    missing = sorted(wanted.keys() - stored.keys())
    if missing:
        raise ValueError(f"{checkpoint} has no {described(missing[0])}")
    load_tensors(wanted, reader, world)


def restore_counters(
    checkpoint: Path, state: TrainState, saved: Mapping[str, Any], afresh: Collection[Part]
) -> None:
    """Restore the counters (ValueError if one is missing) and the completions under way."""
    if (checkpoint / ROLLOUTS).exists() and "rollouts" not in afresh:
        state.rollouts = json.loads((checkpoint / ROLLOUTS).read_text(encoding="utf-8"))
    for name in state.counters():
        if name not in saved:
            raise ValueError(f"run.resume: {checkpoint / STATE} has no {name}")
        if name not in afresh:
            setattr(state, name, saved[name])


def load_tensors(
    targets: dict[str, Tensor], reader: HuggingFaceStorageReader, world: World
) -> None:
    """Read into tensors in place; each rank reads its own part of each."""
    ignore_missing_group()
    try:
        load(targets, storage_reader=reader, no_dist=world.size == 1)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def random_targets(stored: Mapping[str, TensorStorageMetadata], rank: int) -> dict[str, Tensor]:
    """Return copies of this rank's random states that the checkpoint has, to be read into."""
    now = {random_name(rank, device): value for device, value in random_state().items()}
    return {name: value for name, value in now.items() if name in stored}


def restore_random(wanted: Mapping[str, Tensor], step: int, seed: int, rank: int) -> None:
    """Restore a rank's random states; if one is missing, seed all by run, rank and step."""
    names = {random_name(rank, device): device for device in random_state()}
    found = {device: wanted[name] for name, device in names.items() if name in wanted}
    if len(found) < len(names):
        seed_everything(random.Random(f"{seed} {rank} {step}").getrandbits(63))
    restore_random_state(found)


def print_resume_differences(
    saved: Mapping[str, Any],
    stored: Mapping[str, TensorStorageMetadata],
    world: World,
    afresh: Collection[Part],
) -> None:
    """Print once how the resumed run differs from the saved one."""
    devices = random_state()
    names = {random_name(rank, device) for rank in range(world.size) for device in devices}
    if not world.is_first:
        return
    if afresh:
        print(f"starts afresh (run.start_afresh): {', '.join(afresh)}")
    why = None
    if saved["world_size"] != world.size:
        why = f"saved on {saved['world_size']} ranks, resumed on {world.size}"
    elif not names <= stored.keys() and "random" not in afresh:
        why = "the checkpoint has not every random state"
    if why is not None:
        print(f"{why}: the run goes on, but not to the bit of one without a stop")


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


def read_manifest(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of every file that a checkpoint should hold.

    Raises:
        ValueError: if the manifest is damaged.
    """
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{MANIFEST} is missing")
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is damaged") from error
    if STATE not in expected:
        raise ValueError(f"{MANIFEST} does not list {STATE}")
    if not any(name.endswith(SHARD) for name in expected):
        raise ValueError(f"{MANIFEST} lists no {SHARD} file")
    for shard in sorted(checkpoint.glob(f"*{SHARD}")):
        if shard.name not in expected:
            raise ValueError(f"{shard.name} is not in {MANIFEST}")
    return expected


def fault_of(checkpoint: Path, world: World = ALONE) -> str | None:
    """Return the fault of a checkpoint, or None if every file is there and has its hash.

    Each rank reads a share of the files; all come to the same answer.
    """
    mine: list[str | None]
    try:
        files = list(read_manifest(checkpoint).items())[world.rank :: world.size]
        mine = [fault_of_file(checkpoint / name, *entry) for name, entry in files]
    except ValueError as error:
        mine = [str(error)]
    except OSError as error:
        mine = [f"{error.filename}: {error.strerror}"]
    found = (fault for faults in world.gather(mine) for fault in faults)
    return next((fault for fault in found if fault is not None), None)


def newest_good_checkpoint(folder: Path, world: World = ALONE) -> tuple[Path, list[str]]:
    """Return the newest checkpoint without a fault, and a line for each newer one with a fault.

    Raises:
        ValueError: if there is none.
    """
    faults: list[str] = []
    for checkpoint in world.of_first(list_checkpoints(folder)):
        fault = fault_of(checkpoint, world)
        if fault is None:
            return checkpoint, faults
        faults.append(f"{checkpoint}: {fault}")
    found = "; ".join(faults) if faults else "it holds none"
    raise ValueError(f"run.resume: no good checkpoint in {folder}: {found}")
