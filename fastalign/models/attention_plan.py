"""Which tokens attend to which in a packed row, as a few padded blocks of whole groups.

A group (a prompt and its responses) is one dense block: its queries attend to its own keys under a
mask in which a response sees its prompt and itself, never its sibling. Groups of like length share
a block, so a batch needs a few attention calls instead of one for each group.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastalign.batch import Layout, PackedBatch

# Groups at least this fraction of a block's longest share it, so little of a block is padding.
MIN_FILL = 0.75
MIN_FILL_TOKENS = 8
# A block's mask has at most this many elements, unless one group alone needs more.
MAX_MASK_ELEMENTS = 2**24
PADDING = -1
PROMPT = 0


@dataclass
class Block:
    """Groups of like length, padded to the longest: b groups of L tokens.

    Attributes:
        index: (b * L,) int64 positions in the packed row; padding repeats the group's first.
        position: (b, L) int64 positions in the sequence.
        segment: (b, L) int64: 0 the prompt, 1.. the responses, -1 padding.
        masks: masks made so far, by sliding window.
    """

    index: Tensor
    position: Tensor
    segment: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(b, L)."""
        return self.segment.shape[0], self.segment.shape[1]

    def mask(self, window: int | None) -> Tensor:
        """(b, 1, L, L) bool: may query (row) attend to key (column).

        Padding attends to earlier padding and itself, so that no row is empty (its softmax would be
        NaN); it is never read.
        """
        if window not in self.masks:
            order = torch.arange(self.segment.shape[1], device=self.segment.device)
            query, key = self.segment[:, :, None], self.segment[:, None, :]
            allowed = (order[:, None] >= order) & (
                (query == key) | ((key == PROMPT) & (query != PADDING))
            )
            if window is not None:
                distance = self.position[:, :, None] - self.position[:, None, :]
                allowed &= distance < window
            self.masks[window] = allowed[:, None]
        return self.masks[window]


@dataclass
class AttentionPlan:
    """The blocks of one batch, and the way back from block rows to the packed row.

    Attributes:
        blocks: every group is in exactly one.
        inverse: (T,) int64, the row of each packed token among all blocks' rows laid end to end.
    """

    blocks: list[Block]
    inverse: Tensor


def group_segments(layout: Layout) -> list[tuple[int, list[int]]]:
    """For each group: its first token in the row, and its segment numbers."""
    segments = [(start, [PROMPT] * (stop - start)) for start, stop in layout.prompt_bounds]
    counts = [0] * len(segments)
    for (start, stop), group in zip(layout.response_bounds, layout.response_prompt, strict=True):
        counts[group] += 1
        segments[group][1].extend([counts[group]] * (stop - start))
    return segments


def assign_blocks(lengths: list[int]) -> list[list[int]]:
    """Puts groups of like length together, longest first."""
    blocks: list[list[int]] = []
    longest = 0
    for group in sorted(range(len(lengths)), key=lambda g: -lengths[g]):
        length = lengths[group]
        fits = blocks and (length >= MIN_FILL * longest or longest - length <= MIN_FILL_TOKENS)
        if fits and (len(blocks[-1]) + 1) * longest**2 <= MAX_MASK_ELEMENTS:
            blocks[-1].append(group)
        else:
            blocks.append([group])
            longest = length
    return blocks


def plan_attention(batch: PackedBatch) -> AttentionPlan:
    """Plans one batch's attention on the host and puts the index tensors on the batch's device."""
    segments = group_segments(batch.layout)
    device = batch.input_ids.device
    inverse = [0] * batch.num_tokens
    blocks, row = [], 0
    for members in assign_blocks([len(numbers) for _, numbers in segments]):
        longest = len(segments[members[0]][1])
        index, padded = [], []
        for group in members:
            start, numbers = segments[group]
            padding = longest - len(numbers)
            inverse[start : start + len(numbers)] = range(row, row + len(numbers))
            index += [*range(start, start + len(numbers)), *[start] * padding]
            padded.append(numbers + [PADDING] * padding)
            row += longest
        index_tensor = torch.tensor(index, device=device)
        blocks.append(
            Block(
                index=index_tensor,
                position=batch.position_ids[index_tensor].view(len(members), longest),
                segment=torch.tensor(padded, device=device),
            )
        )
    return AttentionPlan(blocks, torch.tensor(inverse, device=device))
