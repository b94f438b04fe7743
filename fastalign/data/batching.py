"""Which examples a step takes, and how they are cut into forwards that fit in memory."""

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache

from fastalign.batch import Group, PackedBatch, pack, ungroup


@lru_cache(maxsize=2)
def _permutation(num_examples: int, seed: int, epoch: int) -> list[int]:
    order = list(range(num_examples))
    # A string is hashed with SHA-512, so neighbouring seeds and epochs are unrelated.
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def indices_of_step(num_examples: int, batch_size: int, step: int, *, seed: int) -> list[int]:
    """The examples of one step: a pure function of its arguments, so a run resumes anywhere.

    Epochs are shuffled independently and laid end to end; step s takes the places
    `[s * batch_size, (s + 1) * batch_size)`. Each epoch serves each example once, every step has
    exactly `batch_size` examples, and a step may reach into the next epoch.

    Raises:
        ValueError: no examples, or a batch size below 1.
    """
    if num_examples < 1:
        raise ValueError(f"num_examples: expected at least 1, got {num_examples}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    indices = []
    place, stop = step * batch_size, (step + 1) * batch_size
    while place < stop:
        epoch, first = divmod(place, num_examples)
        taken = _permutation(num_examples, seed, epoch)[first : first + stop - place]
        indices += taken
        place += len(taken)
    return indices


def micro_batches(
    indices: Sequence[int], lengths: Sequence[int], *, tokens_per_batch: int
) -> list[list[int]]:
    """Cuts a step's examples into batches of at most `tokens_per_batch` tokens.

    First-fit decreasing, so batches are full and few. An example longer than the budget travels
    alone. Within a batch the step's order is kept.

    Args:
        indices: the step's examples; one may occur twice.
        lengths: packed tokens of every example of the data set, by index.
        tokens_per_batch: the budget.

    Raises:
        ValueError: a budget below 1.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch: expected at least 1, got {tokens_per_batch}")
    places = sorted(range(len(indices)), key=lambda place: (-lengths[indices[place]], place))
    batches: list[list[int]] = []
    room: list[int] = []
    for place in places:
        length = lengths[indices[place]]
        for number, free in enumerate(room):
            if length <= free:
                batches[number].append(place)
                room[number] -= length
                break
        else:
            batches.append([place])
            room.append(tokens_per_batch - length)
    return [[indices[place] for place in sorted(batch)] for batch in batches]


def packed_lengths(groups: Sequence[Group], *, repeat_prompts: bool) -> list[int]:
    """Tokens of each group in a batch; `repeat_prompts` counts the prompt for each response."""
    if not repeat_prompts:
        return [group.num_tokens for group in groups]
    return [sum(single.num_tokens for single in ungroup([group])) for group in groups]


def packed_batches(
    groups: Sequence[Group],
    indices: Sequence[int],
    lengths: Sequence[int],
    *,
    tokens_per_batch: int,
    share_prompts: bool,
) -> Iterator[tuple[list[int], PackedBatch]]:
    """Yields the groups at `indices` as batches within the budget, each with its indices.

    Args:
        groups: the whole data set.
        indices: which of them, as for `micro_batches`.
        lengths: of every group, from `packed_lengths`.
        tokens_per_batch: the budget.
        share_prompts: as for `pack`.
    """
    for chosen in micro_batches(indices, lengths, tokens_per_batch=tokens_per_batch):
        yield chosen, pack([groups[i] for i in chosen], share_prompts=share_prompts)
