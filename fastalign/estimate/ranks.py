"""Memory of each rank of a shared run, by arithmetic on the shapes of the run's models.

Weights, gradients and optimiser states are exact for rank 0, whose shards are the largest; what is
gathered and reduced during a computation is an upper bound. Activations come from
`fastalign.estimate.memory`. The reserves of the allocator and of NCCL are not included.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastalign.compute import Compute
from fastalign.estimate.memory import BYTES_OF_STATES, Peak, fake_model, trained_model
from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.parallel import decoder_layers
from fastalign.runs.config import TrainingConfig

TRAINING, REFERENCE, EVALUATION = "training step", "reference log-probs", "evaluation"
BYTES_OF_FLOAT32 = 4  # master weights, their gradients, and the dtype that gradients are summed in


@dataclass(frozen=True)
class ModelWeights:
    """A model's parameters, each once, before it is sharded; with or without data.

    Attributes:
        layers: parameters of each decoder layer, which FSDP2 gathers together.
        rest: embedding, final norm and head, gathered together while a computation lasts.
    """

    layers: Sequence[Sequence[Tensor]]
    rest: Sequence[Tensor]

    @property
    def all(self) -> list[Tensor]:
        """All parameters."""
        return [*(weight for layer in self.layers for weight in layer), *self.rest]

    @property
    def trained(self) -> "ModelWeights":
        """The parameters with a gradient."""
        parts = ([w for w in part if w.requires_grad] for part in (*self.layers, self.rest))
        *layers, rest = parts
        return ModelWeights(layers, rest)

    @property
    def largest_layer(self) -> Sequence[Tensor]:
        """The layer with the most elements."""
        return max(self.layers, key=lambda layer: sum(weight.numel() for weight in layer))


def weights_of(model: Any, *, by_layers: bool = True) -> ModelWeights:
    """Return a model's parameters; `by_layers` lists its layers apart, which DDP does not need.

    Raises:
        ValueError: if the model has no known decoder layers.
    """
    found = decoder_layers(model, "parallel.strategy") if by_layers else []
    layers = [list(layer.parameters()) for layer in found]
    inside = {id(weight) for layer in layers for weight in layer}
    return ModelWeights(layers, [w for w in model.parameters() if id(w) not in inside])


def shard_size(weight: Tensor, ranks: int) -> int:
    """Return the number of elements in rank 0's shard; FSDP2 pads the last shards' rows."""
    rows, *others = weight.shape
    return -(-rows // ranks) * prod(others)


def padded(weights: Iterable[Tensor], ranks: int) -> int:
    """Return the number of elements that a collective moves; all shards are padded alike."""
    return ranks * sum(shard_size(weight, ranks) for weight in weights)


def kept(model: ModelWeights, compute: Compute, *, batches: int = 1) -> Peak:
    """Return what a rank holds of a model between computations, after `batches` of a step.

    It is in host memory with `parallel.offload`.
    """
    trained, ranks = model.trained.all, compute.world.size
    size = sum(weight.numel() for weight in trained)
    if compute.parallel.strategy != "fsdp":
        return Peak(
            weights=sum(weight.numel() * weight.element_size() for weight in model.all),
            gradients=BYTES_OF_FLOAT32 * size,
            states=BYTES_OF_STATES * size,
            buckets=BYTES_OF_FLOAT32 * size if ranks > 1 else 0,
        )
    own = sum(shard_size(weight, ranks) for weight in trained)
    whole = compute.parallel.no_sync and batches > 1
    return Peak(
        weights=sum(shard_size(w, ranks) * w.element_size() for w in model.all),
        gradients=BYTES_OF_FLOAT32 * (size if whole else own),
        states=BYTES_OF_STATES * own,
    )


def gathered(model: ModelWeights, compute: Compute, *, whole: bool = False) -> int:
    """Return the maximum bytes of gathered weights beside the shards during a computation.

    These are the weights outside the layers, the current layer (all layers without
    `reshard_after_forward`), the buffer that receives the next, and the shard that is sent.

    With `whole` the whole model is gathered, as sampling by transformers does.
    """
    if compute.parallel.strategy != "fsdp":
        return 0
    ranks, layer = compute.world.size, model.largest_layer
    stays = whole or not compute.parallel.reshard_after_forward
    opened = model.all if stays else (*model.rest, *layer)
    received = max(padded(model.rest, ranks), padded(layer, ranks))
    sent = BYTES_OF_FLOAT32 * received // ranks
    return compute.dtype.itemsize * (padded(opened, ranks) + received) + sent


def reducing(model: ModelWeights, compute: Compute) -> int:
    """Return the maximum bytes of whole gradients that a backward pass has not yet reduced.

    These are the gradients outside the layers, those of one layer, and a float32 copy of the
    larger of the two as it is sent and received.
    """
    if compute.parallel.strategy != "fsdp":
        return 0
    ranks, trained = compute.world.size, model.trained
    layer, rest = padded(trained.largest_layer, ranks), padded(trained.rest, ranks)
    exchanged = max(layer, rest) + max(layer, rest) // ranks
    return compute.dtype.itemsize * (layer + rest) + BYTES_OF_FLOAT32 * exchanged


def frozen_weights(config: TrainingConfig, section: str, alone: Compute) -> ModelWeights | None:
    """Return the weights of the other model that a section of the settings names, if it does."""
    path = getattr(getattr(config, section, None), "path", None)
    if path is None:
        return None
    model = fake_model(config, alone, path, torch.float32, trained=False)
    return weights_of(model.requires_grad_(False))


def shared_run(
    config: TrainingConfig, compute: Compute, phases: Mapping[str, Peak], num_batches: int
) -> tuple[dict[str, Peak], int]:
    """Return what each rank holds at the peak of each phase, and in host memory.

    `phases` are the peaks of a single process, whose activations are a rank's too. Host memory is
    used by `parallel.offload`.
    """
    batches = -(-num_batches // compute.world.size)
    sharded = compute.parallel.strategy == "fsdp"
    alone = replace(compute, parallel=ParallelConfig())
    model = trained_model(config, alone)
    trained = weights_of(model, by_layers=sharded)
    if not sharded:
        buckets = kept(trained, compute).buckets
        return {name: replace(peak, buckets=buckets) for name, peak in phases.items()}, 0
    reference = frozen_weights(config, "reference", alone)
    teacher = frozen_weights(config, "teacher", alone)
    # A policy that is its own reference has one copy of the weights.
    second, third = (
        0 if other is None else kept(other, compute).weights for other in (reference, teacher)
    )
    training = kept(trained, compute, batches=batches)
    training = replace(training, weights=training.weights + third)
    owned = {
        TRAINING: training,
        REFERENCE: Peak(training.weights + second),
        EVALUATION: replace(training, gradients=0),
    }
    whole = max(gathered(each, compute) for each in (trained, teacher) if each is not None)
    away = config.parallel.offload and compute.device.type != "cpu"
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    of_ranks = {}
    for name, peak in phases.items():
        own = Peak(0) if away else owned[name]
        of_ranks[name] = replace(
            own,
            weights=own.weights + buffers,  # every rank has whole buffers
            activations=peak.activations,
            gathered=gathered(reference or trained, compute) if name == REFERENCE else whole,
            reducing=reducing(trained, compute) if name == TRAINING else 0,
        )
    return of_ranks, max(owned[name].total for name in phases) if away else 0
