"""What each of several ranks holds and sends, by arithmetic on the shapes of a run's models.

Exact, and counted in tests: what a rank keeps between computations, of rank 0, whose parts are the
largest; and the sizes of the buffers that ranks exchange (`fastalign.estimate.traffic`),
padding included. At most: what is gathered and reduced while a computation lasts.

Left out: activations (`fastalign.estimate.memory`), what an allocator and NCCL keep to themselves,
model buffers, and a few kilobytes a step: the gradient's norm, and metrics.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from fastalign.estimate.memory import BYTES_OF_STATES
from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.layers import decoder_layers

# Master weights, their gradients, and what gradients are summed in.
BYTES_OF_FLOAT32 = 4


@dataclass(frozen=True)
class Weight:
    """A parameter.

    Attributes:
        shape: whole.
        element: bytes of one of its numbers, as it is kept.
        trained: whether it has a gradient.
    """

    shape: tuple[int, ...]
    element: int
    trained: bool

    @property
    def size(self) -> int:
        """Its numbers."""
        return prod(self.shape)

    def part(self, ranks: int) -> int:
        """Numbers of rank 0's part: rows are dealt in runs of equal length, the last are short."""
        rows, *others = self.shape
        return -(-rows // ranks) * prod(others)


Weights = tuple[Weight, ...]


@dataclass(frozen=True)
class ModelWeights:
    """A model's parameters, each once.

    Attributes:
        layers: of each decoder layer, which is gathered and let go of as one.
        rest: embedding, final norm, head: gathered as one while a computation lasts.
    """

    layers: tuple[Weights, ...]
    rest: Weights

    @property
    def all(self) -> Weights:
        """Of layers and rest."""
        return (*(weight for layer in self.layers for weight in layer), *self.rest)

    @property
    def trained(self) -> "ModelWeights":
        """Those with a gradient."""
        return ModelWeights(tuple(map(_trained, self.layers)), _trained(self.rest))

    @property
    def largest_layer(self) -> Weights:
        """The one with most numbers."""
        return max(self.layers, key=numbers)


def weights_of(model: Any, *, by_layers: bool = True) -> ModelWeights:
    """Reads a model, with or without data, before it is sharded.

    Args:
        model: any.
        by_layers: tell layers from the rest, which DDP has no need of.

    Raises:
        ValueError: it has no decoder layers that are known as such.
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
    """How many numbers they have, whole."""
    return sum(weight.size for weight in weights)


def parts(weights: Iterable[Weight], ranks: int) -> int:
    """How many numbers rank 0 has of them."""
    return sum(weight.part(ranks) for weight in weights)


def padded(weights: Iterable[Weight], ranks: int) -> int:
    """How many numbers a collective on all of them moves: every rank's part is as long."""
    return ranks * parts(weights, ranks)


@dataclass(frozen=True)
class Sharing:
    """How ranks share models.

    Attributes:
        ranks: how many.
        element: bytes of a number that layers compute in, 2 in bf16; gathered weights have it.
        settings: of the run.
    """

    ranks: int
    element: int
    settings: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def sharded(self) -> bool:
        """Whether each rank has a part of every weight."""
        return self.settings.strategy == "fsdp"


@dataclass(frozen=True)
class Kept:
    """Bytes that a rank keeps of a model: exact. With `parallel.offload` they are the host's.

    Attributes:
        weights: as they are trained or frozen.
        gradients: of the trained ones; whole ones while they are added up without reductions.
        states: AdamW's, in float32.
        buckets: DDP's copy of gradients, in which they are summed.
    """

    weights: int
    gradients: int = 0
    states: int = 0
    buckets: int = 0

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.states + self.buckets


def kept(model: ModelWeights, sharing: Sharing, *, batches: int = 1) -> Kept:
    """What a rank keeps of a model; of a frozen one, its weights alone.

    Args:
        model: whole.
        sharing: by how many ranks, and how.
        batches: of a rank in a step.
    """
    trained = model.trained.all
    if not sharing.sharded:
        size = numbers(trained)
        return Kept(
            weights=sum(weight.size * weight.element for weight in model.all),
            gradients=BYTES_OF_FLOAT32 * size,
            states=BYTES_OF_STATES * size,
            buckets=BYTES_OF_FLOAT32 * size if sharing.ranks > 1 else 0,
        )
    ranks = sharing.ranks
    whole = sharing.settings.no_sync and batches > 1
    return Kept(
        weights=sum(weight.part(ranks) * weight.element for weight in model.all),
        gradients=BYTES_OF_FLOAT32 * (numbers(trained) if whole else parts(trained, ranks)),
        states=BYTES_OF_STATES * parts(trained, ranks),
    )


def gathered(model: ModelWeights, sharing: Sharing, *, whole: bool = False) -> int:
    """Bytes of whole weights beside the parts while the model computes: at most.

    What is outside of the layers, the layer that computes (all of them without
    `reshard_after_forward`), the buffer that the next is received in, and the part that is sent.

    Args:
        model: whole.
        sharing: by how many ranks, and how.
        whole: all of it at once, as transformers samples from it.
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
    """Bytes of whole gradients on their way to the parts, in a backward: at most.

    Those outside of the layers until the end, those of a layer, and what is sent and received.
    """
    if not sharing.sharded:
        return 0
    ranks, trained = sharing.ranks, model.trained
    layer, rest = padded(trained.largest_layer, ranks), padded(trained.rest, ranks)
    exchanged = max(layer, rest) + max(layer, rest) // ranks
    return sharing.element * (layer + rest) + BYTES_OF_FLOAT32 * exchanged
