"""Write checkpoints while training goes on: at most one at a time, each rank its own part.

A checkpoint is a folder `step-000100`, published by a rename. It holds safetensors shards that
`torch.distributed.checkpoint` writes and reads (of a frozen base with an adapter: the adapter
alone), `state.json`, where completions were begun `rollouts.json`, and `manifest.json` (size and
SHA-256 of the others). Nothing in it executes code when it is loaded.

The shards hold one flat set of names: `model.NAME` (what is trained, by `named_parameters()`),
`optimizer.NAME.KEY`, `reference.NAME` and `random.rankR.DEVICE`. A value may be a DTensor, of which
each rank holds a part.
"""

import copy
import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from fastalign.ranks.world import ALONE, World
from fastalign.runs.state import TrainState, random_state, trainable_parameters
from fastalign.written_files import entry_of, sync

CHECKPOINTS = "checkpoints"  # in a run's folder
MANIFEST = "manifest.json"
STATE = "state.json"
ROLLOUTS = "rollouts.json"
SHARD = ".safetensors"
ASIDE = ".writing-"
REMOVED = ".removing-"
FORMAT = 2
# Names of tensors begin with one of these.
MODEL = "model."
OPTIMIZER = "optimizer."
REFERENCE = "reference."
RANDOM = "random."
# A file is made in memory before it is written: a rank's part goes into about so many.
FILES = 32
SMALLEST_FILE_BYTES = 2**26


def place_of(checkpoint: Path) -> tuple[int, int, int] | None:
    """Return a key that orders checkpoints by step, `step-000004` before `step-000004.1`.

    None for a folder that is not a checkpoint.
    """
    found = re.fullmatch(r"step-(\d+)(?:\.(\d+))?", checkpoint.name)
    if found is None:
        return None
    return int(found[1]), int(found[2] is None), int(found[2] or 0)


def checkpoint_of_step(folder: Path, step: int) -> Path:
    """Return the name of a step's checkpoint."""
    return folder / f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first, damaged ones included."""
    places = {path: place_of(path) for path in folder.glob("step-*")}
    found = [(place, path) for path, place in places.items() if place is not None]
    return [path for _, path in sorted(found, reverse=True)]


def clear_left_behind(folder: Path) -> None:
    """Remove folders that a killed run had begun to write or to remove."""
    for half in (*folder.glob(f"{ASIDE}*"), *folder.glob(f"{REMOVED}*")):
        shutil.rmtree(half)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint; once the removal has begun it is not listed any more."""
    hidden = checkpoint.with_name(f"{REMOVED}{checkpoint.name}")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def publish(
    aside: Path,
    final: Path,
    texts: dict[str, str],
    written: dict[str, Any],
    keep: int,
    best: Path | None = None,
) -> None:
    """Write the manifest of a folder of synced files, rename the folder, remove old checkpoints.

    At every moment a checkpoint that was good before is still there, or the new one is.

    `aside` holds the files of all ranks, of which `written` are the manifest's entries; `texts` are
    written to it, and it becomes `final`, `step-NNNNNN`. Of this checkpoint and older ones `keep`
    are kept, and `best`; a newer one is left alone.
    """
    for name, text in texts.items():
        (aside / name).write_text(text, encoding="utf-8")
        sync(aside / name)
    manifest = written | {name: entry_of(aside / name) for name in texts}
    text = json.dumps(dict(sorted(manifest.items())), indent=1)
    (aside / MANIFEST).write_text(text, encoding="utf-8")
    sync(aside / MANIFEST)
    sync(aside)
    if final.exists():
        number = 1 + max((place_of(p) or (0, 0, 0))[2] for p in final.parent.glob("step-*"))
        final.rename(final.with_name(f"{final.name}.{number}"))
    aside.rename(final)
    sync(final.parent)
    place = place_of(final)
    assert place is not None
    older = [p for p in list_checkpoints(final.parent) if (place_of(p) or place) < place]
    replaced = [path for path in older if path.name.startswith(f"{final.name}.")]
    others = [path for path in older if path not in replaced and path != best]
    for old in (*replaced, *others[keep - 1 :]):
        discard(old)


def ignore_missing_group() -> None:
    """Silence DCP's warning about a missing process group, which one process does not need."""
    # Not for a while only: it warns in a thread, and filters are the whole process's.
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")


def random_name(rank: int, device: str) -> str:
    """Return the checkpoint's name of one rank's random state, e.g. `random.rank0.cpu`."""
    return f"{RANDOM}rank{rank}.{device}"


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


def num_bytes(item: WriteItem) -> int:
    """Return the bytes that one rank writes of a tensor."""
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def file_of_each(plans: list[SavePlan]) -> dict[str, int]:
    """Return the number of each tensor's file, from 1; the same on all ranks."""
    sizes: dict[str, int] = {}
    for item in (item for plan in plans for item in plan.items):
        sizes[item.index.fqn] = max(sizes.get(item.index.fqn, 0), num_bytes(item))
    most = max(SMALLEST_FILE_BYTES, sum(sizes.values()) // FILES)
    files: dict[str, int] = {}
    number, used = 1, 0
    for name, size in sizes.items():
        if used and used + size > most:
            number, used = number + 1, 0
        used += size
        files[name] = number
    return files


class CheckpointFailed(OSError):
    """A checkpoint could not be written, which every rank raises alike."""


class ShardWriter(HuggingFaceStorageWriter):
    """Writes one checkpoint: the files of a rank, then on rank 0 what makes them a checkpoint.

    It becomes the folder `final`; `content` is that of `state.json`, `texts` are further files.
    Rank 0 calls `before` before any file is written. `best` is a checkpoint that stays.
    """

    def __init__(
        self,
        final: Path,
        keep: int,
        content: dict[str, Any],
        texts: dict[str, str],
        before: Callable[[], None] | None,
        best: Path | None = None,
    ):
        self.final, self.aside = final, final.with_name(f"{ASIDE}{final.name}")
        self._keep, self._content, self._texts, self._before = keep, content, texts, before
        self._best = best
        super().__init__(str(self.aside), save_distributed=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged; rank 0 makes the folder in `prepare_global_plan`."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder, on rank 0 and before any rank writes."""
        if self._before is not None:
            self._before()
        folder = self.final.parent
        if not folder.exists():
            folder.mkdir(parents=True)
            sync(folder.parent)
        clear_left_behind(folder)
        self.aside.mkdir()
        self.fqn_to_index_mapping = file_of_each(plans)
        return super().prepare_global_plan(plans)

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        """Write, sync and hash the files of this rank."""
        results = super().write_data(plan, planner).wait()
        names = {result.storage_data.relative_path for result in results}
        entries = {name: entry_of(self.aside / name) for name in names}
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([dataclasses.replace(r, storage_data=entries) for r in results[:1]])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publish the checkpoint, on rank 0 and when every rank's files are on the disk."""
        written = {k: v for rank in results for r in rank for k, v in r.storage_data.items()}
        content = self._content | {"tensors": sorted(metadata.state_dict_metadata)}
        texts = {STATE: json.dumps(content, indent=1), **self._texts}
        publish(self.aside, self.final, texts, written, self._keep, self._best)


def not_finite(state: TrainState) -> str | None:
    """Return the name of a weight whose part on this rank is not finite, or None."""
    for name, value in (*trainable_parameters(state.model).items(), *state.reference.items()):
        own = value.to_local() if isinstance(value, DTensor) else value
        if not bool(torch.isfinite(own).all()):
            return name
    return None


@dataclass(frozen=True)
class _Pending:
    writer: ShardWriter
    step: int
    future: "Future[Any]"


class CheckpointWriter:
    """The checkpoints of a run. Every rank makes one, and calls its methods in the same order.

    Args:
        folder: the run's `checkpoints/`, on a disk that all ranks see.
        keep: checkpoints to keep.
        world: the ranks.
        background: write while training goes on; the weights are copied first.
        timeout_seconds: time limit of the ranks' collectives while they write.

    Attributes:
        saved: step of the newest checkpoint that is known to be on the disk; None: there is none.
        num_failed: checkpoints since then that could not be written.
        best: step whose checkpoint is kept whatever its age, or None.
    """

    saved: int | None = None
    num_failed = 0
    best: int | None = None

    def __init__(
        self,
        folder: Path,
        keep: int,
        world: World = ALONE,
        *,
        background: bool = True,
        timeout_seconds: float = 1800.0,
    ) -> None:
        self._folder, self._keep, self._world, self._background = folder, keep, world, background
        self._timeout = timedelta(seconds=timeout_seconds)
        self._pending: _Pending | None = None
        # Training's own collectives are under way while a checkpoint is written.
        self._group = self._new_group() if world.size > 1 else None

    def _new_group(self) -> ProcessGroup:
        return dist.new_group(backend="gloo", timeout=self._timeout)  # type: ignore[no-any-return]

    def save(
        self,
        state: TrainState,
        extra: dict[str, Any],
        *,
        wait: bool = False,
        before: Callable[[], None] | None = None,
    ) -> Path:
        """Begin to write `folder/step-NNNNNN`, after the one before is done.

        What `state` holds may change after this returns. `extra` goes into `state.json`. With
        `wait` the checkpoint is on the disk when this returns, and nothing is copied first. Rank 0
        calls `before`, in the thread that writes, before any file is written.

        Raises:
            ValueError: if a weight is not finite; no checkpoint ever holds one.
            CheckpointFailed: if this one, or the one before, could not be written.
        """
        self.finish()
        # Training's own process group may be broken, where a run is saved behind an error.
        found = self._world.gather(not_finite(state), self._group)
        bad = next((name for name in found if name), None)
        if bad is not None:
            raise ValueError(
                f"step {state.step} is not saved: {bad} holds a non-finite weight, though loss and "
                "gradient were finite; older checkpoints are untouched (a lower optim.lr or "
                "optim.weight_decay may help)"
            )
        writer = self._writer(state, extra, before)
        tensors = tensors_of(state, self._world.rank)
        alone = self._world.size == 1
        if alone and self._group is None and dist.is_available() and dist.is_initialized():
            self._group = self._new_group()  # another library's may have GPUs alone
        how: dict[str, Any] = {"process_group": self._group, "no_dist": alone}
        ignore_missing_group()
        future: Future[Any]
        if self._background and not wait:
            future = async_save(tensors, storage_writer=writer, **how)  # type: ignore[assignment]
        else:
            future = Future()
            try:
                future.set_result(save(tensors, storage_writer=writer, **how))
            except CheckpointException as error:
                future.set_exception(error)
        self._pending = _Pending(writer, state.step, future)
        if wait or not self._background:
            self.finish()
        return writer.final

    def check(self) -> None:
        """Raise the error of the checkpoint that is being written; do not wait for it.

        Raises:
            CheckpointFailed: if it could not be written.
        """
        if self._pending is not None and all(self._world.gather(self._pending.future.done())):
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is on the disk.

        Raises:
            CheckpointFailed: if it could not be written; what was written of it is removed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        failure = pending.future.exception()
        if failure is None:
            self.saved, self.num_failed = pending.step, 0
            return
        self.num_failed += 1
        if self._world.is_first:
            shutil.rmtree(pending.writer.aside, ignore_errors=True)
        raise failure_of(pending.writer.final, failure) from failure

    def close(self) -> None:
        """Finish when the run ends by another error: print a failure instead of raising it."""
        try:
            self.finish()
        except Exception as error:
            print(error)

    def _writer(
        self, state: TrainState, extra: dict[str, Any], before: Callable[[], None] | None
    ) -> ShardWriter:
        content = {
            "format": FORMAT,
            **state.counters(),
            "world_size": self._world.size,
            "optimizer": optimizer_settings(state),
            **extra,
        }
        texts = {ROLLOUTS: json.dumps(state.rollouts)} if state.rollouts else {}
        final = checkpoint_of_step(self._folder, state.step)
        best = None if self.best is None else checkpoint_of_step(self._folder, self.best)
        return ShardWriter(final, self._keep, copy.deepcopy(content), texts, before, best)


def failure_of(final: Path, failure: BaseException) -> Exception:
    """Return an error of one line that names the checkpoint and the system's reason."""
    if not isinstance(failure, CheckpointException):  # of the collectives: a rank is gone
        return RuntimeError(f"checkpoint {final} was not written: {failure!r}")
    rank, (cause, _) = next(iter(failure.failures.items()))
    where = f" (rank {rank})" if len(failure.failures) > 1 or rank else ""
    why = (cause.strerror or cause) if isinstance(cause, OSError) else repr(cause)
    return CheckpointFailed(
        f"checkpoint {final} was not written{where}: {why}; older checkpoints are untouched"
    )
