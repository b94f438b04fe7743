"""The packed batch: prompts and their responses concatenated in one row, without padding.

Legend: T packed tokens, N predicted tokens, G groups (prompts), R responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """A prompt and its responses, as token ids.

    Attributes:
        prompt_ids: at least one token; the last one predicts each response's first.
        response_ids: one or more responses, each of at least one token.
        response_loss_mask: True for the response tokens to train on; None: all of them.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[Sequence[int]]
    response_loss_mask: Sequence[Sequence[bool]] | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("Group: expected a prompt of at least one token, got none")
        if not self.response_ids:
            raise ValueError("Group: expected at least one response, got none")
        for number, response in enumerate(self.response_ids):
            if not response:
                raise ValueError(f"Group: response {number} has no token; expected at least one")
        if self.response_loss_mask is not None:
            have = [len(mask) for mask in self.response_loss_mask]
            want = [len(response) for response in self.response_ids]
            if have != want:
                raise ValueError(
                    f"Group: response_loss_mask has lengths {have}, the responses {want}"
                )

    @property
    def num_tokens(self) -> int:
        """Tokens of the group in a packed row: the prompt once, and every response."""
        return len(self.prompt_ids) + sum(len(response) for response in self.response_ids)

    def target_positions(self, number: int) -> list[int]:
        """Return the positions of the trained tokens within response `number`."""
        if self.response_loss_mask is None:
            return list(range(len(self.response_ids[number])))
        return [place for place, used in enumerate(self.response_loss_mask[number]) if used]


@dataclass(frozen=True)
class Layout:
    """The bounds of a batch as Python numbers, so that the host plans without a GPU sync.

    Attributes:
        prompt_bounds: first token of each prompt and one past the last.
        response_bounds: likewise of each response.
        response_prompt: the group of each response.
        target_bounds: response r owns rows [r] to [r + 1] of the N predicted tokens.
    """

    prompt_bounds: tuple[tuple[int, int], ...]
    response_bounds: tuple[tuple[int, int], ...]
    response_prompt: tuple[int, ...]
    target_bounds: tuple[int, ...]


@dataclass(frozen=True)
class PackedBatch:
    """Concatenated groups: each prompt once, followed by its responses.

    Attributes:
        input_ids: (T,) int64.
        position_ids: (T,) int64; each response continues its prompt's positions.
        response_bounds: (R, 2) int64, first token and one past the last.
        predict_index: (N,) int64, positions whose hidden states predict the trained tokens.
        targets: (N,) int64, the trained tokens.
        target_bounds: (R + 1,) int64; response r owns rows [r] to [r + 1] of the N.
        layout: the bounds as Python numbers.
    """

    input_ids: Tensor
    position_ids: Tensor
    response_bounds: Tensor
    predict_index: Tensor
    targets: Tensor
    target_bounds: Tensor
    layout: Layout

    @property
    def num_tokens(self) -> int:
        """T: packed tokens."""
        return self.input_ids.numel()

    @property
    def num_targets(self) -> int:
        """N: predicted tokens."""
        return self.targets.numel()

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch with its tensors on `device`."""
        return PackedBatch(
            layout=self.layout,
            **{
                name: value.to(device, non_blocking=True)
                for name, value in vars(self).items()
                if isinstance(value, Tensor)
            },
        )


def ungroup(groups: Sequence[Group]) -> list[Group]:
    """Return one group per response, in the same order; prompts are repeated."""
    return [
        Group(
            group.prompt_ids,
            [response],
            None if group.response_loss_mask is None else [group.response_loss_mask[number]],
        )
        for group in groups
        for number, response in enumerate(group.response_ids)
    ]


def pack(groups: Sequence[Group], *, share_prompts: bool = True) -> PackedBatch:
    """Concatenate groups to a batch.

    With `share_prompts` False the prompt is repeated before each response; the order of responses
    and of predicted tokens stays the same.

    Raises:
        ValueError: if there are no groups.
    """
    if not groups:
        raise ValueError("pack: expected at least one group, got none")
    if not share_prompts:
        groups = ungroup(groups)
    input_ids: list[int] = []
    position_ids: list[int] = []
    prompt_bounds: list[tuple[int, int]] = []
    response_bounds: list[tuple[int, int]] = []
    response_prompt: list[int] = []
    predict_index: list[int] = []
    targets: list[int] = []
    num_targets: list[int] = []
    for number, group in enumerate(groups):
        start = len(input_ids)
        prompt_length = len(group.prompt_ids)
        input_ids += group.prompt_ids
        position_ids += range(prompt_length)
        prompt_bounds.append((start, start + prompt_length))
        for which, response in enumerate(group.response_ids):
            first = len(input_ids)
            input_ids += response
            position_ids += range(prompt_length, prompt_length + len(response))
            response_bounds.append((first, first + len(response)))
            response_prompt.append(number)
            places = group.target_positions(which)
            last_of_prompt = start + prompt_length - 1
            predict_index += [first + p - 1 if p else last_of_prompt for p in places]
            targets += [response[p] for p in places]
            num_targets.append(len(places))
    layout = Layout(
        prompt_bounds=tuple(prompt_bounds),
        response_bounds=tuple(response_bounds),
        response_prompt=tuple(response_prompt),
        target_bounds=tuple(accumulate(num_targets, initial=0)),
    )
    return PackedBatch(
        input_ids=torch.tensor(input_ids),
        position_ids=torch.tensor(position_ids),
        response_bounds=torch.tensor(response_bounds),
        predict_index=torch.tensor(predict_index, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        target_bounds=torch.tensor(layout.target_bounds),
        layout=layout,
    )
