"""Memory of each rank of a shared run, by arithmetic on the shapes of the run's models.

Weights, gradients and optimiser states are exact for rank 0, whose shards are the largest; what is
gathered and reduced during a computation is an upper bound. Activations come from
`fastalign.estimate.memory`. The reserves of the allocator and of NCCL are not included.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from fastalign.compute import Compute
from fastalign.estimate.memory import BYTES_OF_STATES, Peak, reference_model, trained_model
from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.parallel import decoder_layers
from fastalign.runs.config import AnyConfig

TRAINING, REFERENCE, EVALUATION = "training step", "reference log-probs", "evaluation"
BYTES_OF_FLOAT32 = 4  # master weights, their gradients, and the dtype that gradients are summed in


@dataclass(frozen=True)
class Weight:
    """Shape and storage of a parameter.

    Attributes:
        shape: shape of the whole parameter.
        element: bytes of an element as it is stored.
        trained: whether it has a gradient.
    """

    shape: tuple[int, ...]
    element: int
    trained: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def part(self, ranks: int) -> int:
        """Return the number of elements in rank 0's shard; FSDP2 pads the last shards' rows."""
        rows, *others = self.shape
        return -(-rows // ranks) * prod(others)


Weights = tuple[Weight, ...]


@dataclass(frozen=True)
class ModelWeights:
    """A model's parameters, each once.

    Attributes:
        layers: parameters of each decoder layer, which FSDP2 gathers together.
        rest: embedding, final norm and head, gathered together while a computation lasts.
    """

    layers: tuple[Weights, ...]
    rest: Weights

    @property
    def all(self) -> Weights:
        """All parameters."""
        return (*(weight for layer in self.layers for weight in layer), *self.rest)

    @property
    def trained(self) -> "ModelWeights":
        """The parameters with a gradient."""
        return ModelWeights(tuple(map(_trained, self.layers)), _trained(self.rest))

    @property
    def largest_layer(self) -> Weights:
        """The layer with the most elements."""
        return max(self.layers, key=numbers)


def weights_of(model: Any, *, by_layers: bool = True) -> ModelWeights:
    """Return the parameters of a model, with or without data, before it is sharded.

    `by_layers` lists the decoder layers apart, which DDP does not need.

    Raises:
        ValueError: if the model has no known decoder layers.
    """

    def found(part: Any, apart: set[int]) -> Weights:
        return tuple(
            Weight(tuple(p.shape), p.element_size(), p.requires_grad)
            for p in part.parameters()
            if id(p) not in apart
        )

    layers = decoder_layers(model, "parallel.strategy") if by_layers else []
    of_layers = {id(p) for layer in layers for p in layer.parameters()}
    return ModelWeights(tuple(found(layer, set()) for layer in layers), found(model, of_layers))


def _trained(weights: Weights) -> Weights:
    return tuple(weight for weight in weights if weight.trained)


def numbers(weights: Iterable[Weight]) -> int:
    """Return the number of elements of whole parameters."""
    return sum(weight.size for weight in weights)


def parts(weights: Iterable[Weight], ranks: int) -> int:
    """Return the number of elements that rank 0 holds."""
    return sum(weight.part(ranks) for weight in weights)


def padded(weights: Iterable[Weight], ranks: int) -> int:
    """Return the number of elements that a collective moves; all shards are padded alike."""
    return ranks * parts(weights, ranks)


@dataclass(frozen=True)
class Sharing:
    """The ranks of a run and their parallel settings.

    Attributes:
        ranks: number of ranks.
        element: bytes of an element of the compute dtype, which gathered weights have.
        settings: the run's `parallel` settings.
    """

    ranks: int
    element: int
    settings: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def sharded(self) -> bool:
        """True if each rank holds a shard of every weight."""
        return self.settings.strategy == "fsdp"


def kept(model: ModelWeights, sharing: Sharing, *, batches: int = 1) -> Peak:
    """Return what a rank holds of a model between computations, after `batches` of a step.

    It is in host memory with `parallel.offload`.
    """
    trained = model.trained.all
    if not sharing.sharded:
        size = numbers(trained)
        return Peak(
            weights=sum(weight.size * weight.element for weight in model.all),
            gradients=BYTES_OF_FLOAT32 * size,
            states=BYTES_OF_STATES * size,
            buckets=BYTES_OF_FLOAT32 * size if sharing.ranks > 1 else 0,
        )
    ranks = sharing.ranks
    whole = sharing.settings.no_sync and batches > 1
    return Peak(
        weights=sum(weight.part(ranks) * weight.element for weight in model.all),
        gradients=BYTES_OF_FLOAT32 * (numbers(trained) if whole else parts(trained, ranks)),
        states=BYTES_OF_STATES * parts(trained, ranks),
    )


def gathered(model: ModelWeights, sharing: Sharing, *, whole: bool = False) -> int:
    """Return the maximum bytes of gathered weights beside the shards during a computation.

    These are the weights outside the layers, the current layer (all layers without
    `reshard_after_forward`), the buffer that receives the next, and the shard that is sent.

    With `whole` the whole model is gathered, as sampling by transformers does.
    """
    if not sharing.sharded:
        return 0
    ranks, layer = sharing.ranks, model.largest_layer
    stays = whole or not sharing.settings.reshard_after_forward
    opened = model.all if stays else (*model.rest, *layer)
    received = max(padded(model.rest, ranks), padded(layer, ranks))
    sent = BYTES_OF_FLOAT32 * received // ranks
    return sharing.element * (padded(opened, ranks) + received) + sent


def reducing(model: ModelWeights, sharing: Sharing) -> int:
    """Return the maximum bytes of whole gradients that a backward pass has not yet reduced.

    These are the gradients outside the layers, those of one layer, and a float32 copy of the
    larger of the two as it is sent and received.
    """
    if not sharing.sharded:
        return 0
    ranks, trained = sharing.ranks, model.trained
    layer, rest = padded(trained.largest_layer, ranks), padded(trained.rest, ranks)
    exchanged = max(layer, rest) + max(layer, rest) // ranks
    return sharing.element * (layer + rest) + BYTES_OF_FLOAT32 * exchanged


@dataclass(frozen=True)
class SharedRun:
    """A rank's share of a run.

    Attributes:
        ranks: number of ranks.
        phases: bytes on a rank's device at the peak of each phase, by the phase's name.
        host: bytes in host memory for each rank (`parallel.offload`).
        batches: number of a rank's batches in a step.
    """

    ranks: int
    phases: dict[str, Peak]
    host: int
    batches: int


def shared_run(
    config: AnyConfig, compute: Compute, phases: Mapping[str, Peak], num_batches: int
) -> SharedRun:
    """Return what each rank holds in each phase.

    `phases` are the peaks of a single process, whose activations are a rank's too.
    """
    ranks = compute.world.size
    batches = -(-num_batches // ranks)
    sharing = Sharing(ranks, compute.dtype.itemsize, config.parallel)
    alone = replace(compute, parallel=ParallelConfig())
    model = trained_model(config, alone)
    trained = weights_of(model, by_layers=sharing.sharded)
    if not sharing.sharded:
        buckets = kept(trained, sharing).buckets
        of_ranks = {name: replace(peak, buckets=buckets) for name, peak in phases.items()}
        return SharedRun(ranks, of_ranks, 0, batches)
    reference, path = trained, getattr(getattr(config, "reference", None), "path", None)
    if path is not None:
        reference = weights_of(reference_model(config, alone, path).requires_grad_(False))
    # A policy that is its own reference has one copy of the weights.
    second = 0 if path is None else kept(reference, sharing).weights
    training = kept(trained, sharing, batches=batches)
    owned = {
        TRAINING: training,
        REFERENCE: Peak(training.weights + second),
        EVALUATION: replace(training, gradients=0),
    }
    away = config.parallel.offload and compute.device.type != "cpu"
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    of_ranks = {}
    for name, peak in phases.items():
        own = Peak(0) if away else owned[name]
        of_ranks[name] = replace(
            own,
            weights=own.weights + buffers,  # every rank has whole buffers
            activations=peak.activations,
            gathered=gathered(reference if name == REFERENCE else trained, sharing),
            reducing=reducing(trained, sharing) if name == TRAINING else 0,
        )
    host = max(owned[name].total for name in phases) if away else 0
    return SharedRun(ranks, of_ranks, host, batches)
