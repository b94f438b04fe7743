"""A run goes on from its newest good checkpoint, if that began with the same data and weights."""

from pathlib import Path
from typing import Any

from fastalign.models import has_adapter
from fastalign.models.fingerprint import model_fingerprint
from fastalign.ranks.world import ALONE, World
from fastalign.runs.checkpoint.files import CHECKPOINTS, newest_good_checkpoint
from fastalign.runs.checkpoint.restore import read_state, restore
from fastalign.runs.checkpoint.writer import CheckpointWriter
from fastalign.runs.config import AnyConfig, RunConfig
from fastalign.runs.metrics import METRICS, AnyWriter
from fastalign.runs.state import TrainState
from fastalign.runs.task import Task

# What training begins from and a checkpoint does not hold: it holds their fingerprints.
SOURCES = {
    "data_fingerprint": "training data",
    "base_fingerprint": "frozen base in model.path",
    "reference_fingerprint": "frozen reference",
}


def sources_of(task: Task, policy: Any) -> dict[str, Any]:
    """The fingerprints of what training begins from."""
    reference, known = task.reference, task.reference_fingerprint
    return {
        "data_fingerprint": task.data_fingerprint,
        "base_fingerprint": model_fingerprint(policy) if has_adapter(policy) else None,
        "reference_fingerprint": known if reference is None else model_fingerprint(reference),
    }


def resume(run: RunConfig, state: TrainState, sources: dict[str, Any], world: World = ALONE) -> int:
    """Restores the newest good checkpoint; says which newer ones are damaged.

    `sources` are the fingerprints of what training began from, as the checkpoint holds them.

    Returns:
        How long `metrics.jsonl` was at the checkpoint.

    Raises:
        ValueError: there is none, or it was made with other data, or on another frozen base.
    """
    checkpoint, faults = newest_good_checkpoint(Path(run.dir) / CHECKPOINTS, world)
    for fault in faults if world.is_first else ():
        print(f"damaged checkpoint passed over: {fault}", flush=True)
    saved = read_state(checkpoint)
    for name, value in sources.items():
        if saved.get(name) != value:
            what = SOURCES[name]
            raise ValueError(f"run.resume: the {what} is not what {checkpoint} was trained on")
    restore(checkpoint, state, world, seed=run.seed, afresh=run.start_afresh)
    if world.is_first:
        print(f"resumed from {checkpoint}", flush=True)
    num_bytes: int = saved["metrics_bytes"]
    return whole_lines(Path(run.dir), num_bytes) if "metrics" in run.start_afresh else num_bytes


def whole_lines(folder: Path, num_bytes: int) -> int:
    """Bytes of the whole lines among the first ones of `metrics.jsonl`, as far as it is there."""
    path = folder / METRICS
    there = path.read_bytes()[:num_bytes] if path.exists() else b""
    return there.rfind(b"\n") + 1


def checkpoint_writer(config: AnyConfig, world: World) -> CheckpointWriter:
    """Of the run's `checkpoints/`."""
    return CheckpointWriter(
        Path(config.run.dir) / CHECKPOINTS,
        config.train.keep_checkpoints,
        world,
        background=config.train.async_checkpoints,
    )


def save_run(
    checkpoints: CheckpointWriter,
    writer: AnyWriter,
    task: Task,
    state: TrainState,
    sources: dict[str, Any],
    *,
    last: bool = True,
) -> None:
    """Begins a checkpoint; the run's last is on the disk when this returns."""
    task.before_save(state)
    checkpoints.save(state, {"metrics_bytes": writer.num_bytes(), **sources}, wait=last)
