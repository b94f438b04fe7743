"""A run's estimate as several ranks share it: what each holds by phase, and what they exchange."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastalign.compute import Compute
from fastalign.estimate.memory import Peak
from fastalign.estimate.model import reference_model, trained_model
from fastalign.estimate.scaling import (
    Kept,
    ModelWeights,
    Sharing,
    gathered,
    kept,
    reducing,
    weights_of,
)
from fastalign.estimate.traffic import Traffic, forward_traffic, gradient_traffic
from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.world import World
from fastalign.runs.config import AnyConfig
from fastalign.runs.load_models import check_sharing

TRAINING, REFERENCE, EVALUATION = "training step", "reference log-probs", "evaluation"


@dataclass(frozen=True)
class SharedRun:
    """What ranks make of a run.

    Attributes:
        ranks: how many.
        phases: name to the bytes alive on a rank's device at the fullest moment.
        host: bytes in host memory for each rank (`parallel.offload`).
        batches: of a rank in a step.
        traffic: of a phase: of a training step as a whole, of other phases for each batch.
    """

    ranks: int
    phases: dict[str, Peak]
    host: int
    batches: int
    traffic: dict[str, Traffic]


def compute_of_rank(config: AnyConfig, compute: Compute, ranks: int) -> Compute:
    """The rank that gets the largest batches.

    Raises:
        ValueError: settings that the ranks would refuse.
    """
    check_sharing(config)
    return replace(compute, world=World(size=ranks), parallel=config.parallel)


def shared_run(
    config: AnyConfig, compute: Compute, phases: Mapping[str, Peak], num_batches: int
) -> SharedRun:
    """What each rank holds and sends in these phases, of which the activations stay.

    Args:
        config: of the run.
        compute: from `compute_of_rank`.
        phases: as one process would hold them.
        num_batches: of all ranks in a step.
    """
    ranks = compute.world.size
    batches = -(-num_batches // ranks)
    sharing = Sharing(ranks, compute.dtype.itemsize, config.parallel)
    alone = replace(compute, parallel=ParallelConfig())
    model = trained_model(config, alone)
    trained = weights_of(model, by_layers=sharing.sharded)
    read = trained
    path = getattr(getattr(config, "reference", None), "path", None)
    if path is not None:
        reference = reference_model(config, alone, path)
        read = weights_of(reference.requires_grad_(False), by_layers=sharing.sharded)
    traffic = {TRAINING: gradient_traffic(trained, sharing, batches)}
    for name in phases.keys() - {TRAINING}:
        traffic[name] = forward_traffic(read if name == REFERENCE else trained, sharing)
    if not sharing.sharded:
        buckets = kept(trained, sharing).buckets
        of_ranks = {name: replace(peak, buckets=buckets) for name, peak in phases.items()}
        return SharedRun(ranks, of_ranks, 0, batches, traffic)
    owned = {name: owned_in(name, trained, read, sharing, batches) for name in phases}
    away = config.parallel.offload and compute.device.type != "cpu"
    of_ranks = {}
    for name, peak in phases.items():
        own = Kept(0) if away else owned[name]
        computing = read if name == REFERENCE else trained
        of_ranks[name] = Peak(
            weights=own.weights + buffer_bytes_of(model),
            gradients=own.gradients,
            states=own.states,
            activations=peak.activations,
            gathered=gathered(computing, sharing),
            reducing=reducing(trained, sharing) if name == TRAINING else 0,
        )
    host = max(each.total for each in owned.values()) if away else 0
    return SharedRun(ranks, of_ranks, host, batches, traffic)


def owned_in(
    name: str, trained: ModelWeights, read: ModelWeights, sharing: Sharing, batches: int
) -> Kept:
    """What a rank keeps during a phase, `read` being the reference."""
    own = kept(trained, sharing, batches=batches)
    if name == TRAINING:
        return own
    if name == EVALUATION:
        return replace(own, gradients=0)
    beside = 0 if read is trained else kept(read, sharing).weights
    return Kept(weights=own.weights + beside)


def buffer_bytes_of(model: Any) -> int:
    """Of buffers, which every rank has whole."""
    return sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
