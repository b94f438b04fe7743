"""The schedule: the examples of each step, cut into micro-batches that fit in memory."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from itertools import pairwise
from typing import Any, NamedTuple

from fastalign.batch.packed import Group, PackedBatch, pack, ungroup
from fastalign.batch.stored import StoredGroups
from fastalign.choices import Packing
from fastalign.compute import Compute


@dataclass(frozen=True)
class Mixture:
    """The draws of an epoch from several sources, whose examples lie one behind the other.

    Attributes:
        sizes: number of examples of each source, at least 1.
        drawn: number of examples that an epoch draws of each source, at least 1.
    """

    sizes: tuple[int, ...]
    drawn: tuple[int, ...]

    @property
    def epoch_size(self) -> int:
        """Number of examples of an epoch."""
        return sum(self.drawn)


def mixture_of(data: Any) -> Mixture:
    """Return a data set's `mixture`, or, if it has none, that of an epoch of each example once."""
    found: Mixture | None = getattr(data, "mixture", None)
    return found or Mixture((len(data),), (len(data),))


def num_drawn(num_examples: int, weight: float) -> int:
    """Return how many examples of a source an epoch draws: each `weight` times, in whole numbers.

    At least one is drawn.
    """
    return max(1, round(weight * num_examples))


@lru_cache(maxsize=2)
def _epoch(mixture: Mixture, seed: int, epoch: int) -> list[int]:
    """Return the examples of one epoch, in their order."""
    order: list[int] = []
    start = 0
    for number, (size, drawn) in enumerate(zip(mixture.sizes, mixture.drawn, strict=True)):
        order += [start + i for i in _draws(size, drawn, epoch, f"{seed}/source {number}")]
        start += size
    # random.Random hashes a string with SHA-512, so similar seeds and epochs are unrelated.
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _draws(size: int, drawn: int, epoch: int, seed: str) -> list[int]:
    """Return what an epoch draws of one source: the next `drawn` of endless shuffled passes.

    So the examples of a source are drawn equally often, but for one, at any time. A pass that lies
    in one epoch as a whole keeps its order here, since the epoch is shuffled.
    """
    found: list[int] = []
    place, stop = epoch * drawn, (epoch + 1) * drawn
    while place < stop:
        number, first = divmod(place, size)
        last = min(size, first + stop - place)
        examples = list(range(size))
        if last - first < size:
            random.Random(f"{seed}/{number}").shuffle(examples)
        found += examples[first:last]
        place += last - first
    return found


def indices_of_step(examples: int | Mixture, batch_size: int, step: int, *, seed: int) -> list[int]:
    """Return the examples of one step, a pure function of the arguments: a run resumes anywhere.

    Epochs are shuffled independently and concatenated; step s takes the positions
    `[s * batch_size, (s + 1) * batch_size)`. Each epoch has each of `examples`, if that is their
    number, once; else as many of each source as the mixture says. Every step has exactly
    `batch_size` examples, and a step may continue into the next epoch. Of a number of examples, a
    step has one twice within an epoch only if `batch_size` is larger than the number.

    Raises:
        ValueError: if there are no examples, or the batch size is below 1.
    """
    mixture = Mixture((examples,), (examples,)) if isinstance(examples, int) else examples
    if min(mixture.sizes) < 1:
        raise ValueError(f"num_examples: expected at least 1, got {min(mixture.sizes)}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    indices = []
    place, stop = step * batch_size, (step + 1) * batch_size
    while place < stop:
        epoch, first = divmod(place, mixture.epoch_size)
        taken = _epoch(mixture, seed, epoch)[first : first + stop - place]
        indices += taken
        place += len(taken)
    return indices


def mini_batches(num_examples: int, count: int, order: str) -> list[list[int]]:
    """Cut examples, in an order that `order` seeds, into equal parts, at most `count`."""
    shuffled = list(range(num_examples))
    random.Random(order).shuffle(shuffled)
    count = min(count, num_examples)
    cuts = [num_examples * part // count for part in range(count + 1)]
    return [shuffled[first:last] for first, last in pairwise(cuts)]


def micro_batches(
    indices: Sequence[int], lengths: Sequence[int], *, tokens_per_batch: int, num_ranks: int = 1
) -> list[list[int]]:
    """Cut a step's examples into batches of at most `tokens_per_batch` tokens.

    First-fit decreasing finds the number of batches, which are then filled evenly: a step a little
    over the budget makes two halves rather than a full batch and a small one, which would take as
    long and need the memory of the full one. An example longer than the budget is a batch of its
    own. Within a batch the step's order is kept. Ranks take batches in turn, and each has as many
    as the others; the last ones are empty if there are too few examples.

    `indices` may hold an example twice; `lengths` are the packed tokens of every example of the
    data set, by index.

    Raises:
        ValueError: if the limit is below 1.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch: expected at least 1, got {tokens_per_batch}")
    sizes = [lengths[index] for index in indices]
    places = sorted(range(len(indices)), key=lambda place: (-sizes[place], place))
    alone = [[place] for place in places if sizes[place] > tokens_per_batch]
    fitting = places[len(alone) :]
    batches = _first_fit(fitting, sizes, tokens_per_batch)
    batches += [[] for _ in range(-(len(alone) + len(batches)) % num_ranks)]
    even = _spread(fitting, sizes, len(batches))
    if all(sum(sizes[place] for place in batch) <= tokens_per_batch for batch in even):
        batches = even
    return [[indices[place] for place in sorted(batch)] for batch in alone + batches]


def _first_fit(places: Sequence[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room: list[int] = []
    for place in places:
        for number, free in enumerate(room):
            if sizes[place] <= free:
                batches[number].append(place)
                room[number] -= sizes[place]
                break
        else:
            batches.append([place])
            room.append(budget - sizes[place])
    return batches


def _spread(places: Sequence[int], sizes: Sequence[int], num_batches: int) -> list[list[int]]:
    # Longest-processing-time rule: the next largest example goes to the batch with fewest tokens.
    batches: list[list[int]] = [[] for _ in range(num_batches)]
    loads = [(0, number) for number in range(num_batches)]
    for place in places:
        load, number = heappop(loads)
        batches[number].append(place)
        heappush(loads, (load + sizes[place], number))
    return batches


def packed_lengths(groups: Sequence[Group], packing: Packing) -> Sequence[int]:
    """Return the tokens of each group in a batch; `shared_prefix` counts a prompt only once."""
    if isinstance(groups, StoredGroups):
        return groups.lengths(share_prompts=packing == "shared_prefix")
    if packing == "shared_prefix":
        return [group.num_tokens for group in groups]
    return [sum(single.num_tokens for single in ungroup([group])) for group in groups]


class Piece(NamedTuple):
    """A micro-batch of one rank.

    Attributes:
        indices: indices of its groups.
        batch: the groups.
        counts: False if the batch only fills up the rank's turn; its results are to be dropped.
    """

    indices: list[int]
    batch: PackedBatch
    counts: bool


def packed_batches(
    groups: Sequence[Group],
    indices: Sequence[int],
    lengths: Sequence[int],
    compute: Compute,
) -> Iterator[Piece]:
    """Yield this rank's share of the groups at `indices` as batches within the token budget.

    Every rank gets as many batches as the others, since all of them must take part in every forward
    of a sharded model: a rank without groups gets the shortest group, which does not count.

    `indices` and `lengths` are as for `micro_batches`.
    """
    world = compute.world
    batches = micro_batches(
        indices, lengths, tokens_per_batch=compute.tokens_per_batch, num_ranks=world.size
    )
    for chosen in batches[world.rank :: world.size]:
        there = chosen or [min(indices, key=lambda index: lengths[index])]
        batch = pack([groups[i] for i in there], share_prompts=compute.share_prompts)
        yield Piece(there, batch, counts=bool(chosen))
