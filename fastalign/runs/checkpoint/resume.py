"""Resume a run from its newest good checkpoint, if that began with the same data and weights."""

from pathlib import Path
from typing import Any

from fastalign.ranks.world import ALONE, World
from fastalign.runs.checkpoint.files import CHECKPOINTS, newest_good_checkpoint
from fastalign.runs.checkpoint.restore import read_state, restore
from fastalign.runs.config import RunConfig
from fastalign.runs.metrics import METRICS
from fastalign.runs.state import TrainState

# Training begins from these; a checkpoint holds their fingerprints only.
SOURCES = {
    "data_fingerprint": "training data",
    "base_fingerprint": "frozen base in model.path",
    "reference_fingerprint": "frozen reference",
}


def resume(run: RunConfig, state: TrainState, sources: dict[str, Any], world: World = ALONE) -> int:
    """Restore the newest good checkpoint; print which newer ones are damaged.

    Args:
        run: the run's folder and seed, and the parts that are not restored.
        state: model, optimiser and counters, which are changed in place.
        sources: fingerprints of the data and frozen models that training began from.
        world: the ranks.

    Returns:
        Length of `metrics.jsonl` in bytes when the checkpoint was made.

    Raises:
        ValueError: if there is no good checkpoint, or it was made from other sources.
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
    """Return the bytes of the whole lines among the first `num_bytes` of `metrics.jsonl`."""
    path = folder / METRICS
    there = path.read_bytes()[:num_bytes] if path.exists() else b""
    return there.rfind(b"\n") + 1
