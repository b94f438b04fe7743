"""The best and the worst of each prompt's samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastalign.batch import Group


@dataclass(frozen=True)
class FreshPairs:
    """B pairs of some rollouts; the first three are parallel.

    Attributes:
        groups: each with two responses, the better one first.
        places: of the two among the rollouts' R responses.
        ties: whether the two have the same score.
        num_ties_dropped: prompts of which there is no pair.
    """

    groups: list[Group]
    places: list[tuple[int, int]]
    ties: list[bool]
    num_ties_dropped: int


def choose_pairs(
    groups: Sequence[Group], scores: Tensor, ties: Literal["drop", "use"]
) -> FreshPairs:
    """A pair of each prompt; the first of equals is taken.

    Samples of one score have no best. With `use` two of them that differ are a tie; where all are
    the same tokens there is nothing to compare, whatever their scores.

    Args:
        groups: prompts with their samples.
        scores: (R,), in the order of the groups' responses.
        ties: what happens to prompts whose samples have one score.
    """
    chosen: list[tuple[Group, tuple[int, int], bool]] = []
    start = 0
    values = scores.tolist()
    for group in groups:
        samples = [list(ids) for ids in group.response_ids]
        own = values[start : start + len(samples)]
        best, worst = own.index(max(own)), own.index(min(own))
        is_tie = own[best] == own[worst]
        if is_tie:  # the other side is the first that differs, if any does
            worst = next((i for i, ids in enumerate(samples) if ids != samples[best]), best)
        if samples[best] != samples[worst] and not (is_tie and ties == "drop"):
            pair = Group(group.prompt_ids, [samples[best], samples[worst]])
            chosen.append((pair, (start + best, start + worst), is_tie))
        start += len(samples)
    assert start == len(values)
    return FreshPairs(
        groups=[pair for pair, _, _ in chosen],
        places=[places for _, places, _ in chosen],
        ties=[is_tie for _, _, is_tie in chosen],
        num_ties_dropped=len(groups) - len(chosen),
    )
