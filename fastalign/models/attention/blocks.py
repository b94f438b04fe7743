"""Shared-prefix attention by scaled dot products of a few padded blocks: any device, any dtype.

On a CPU `native` computes all of them at once, or `strips` a block that native code cannot: of
another dtype, with a softcap or sinks. Elsewhere it is PyTorch's fused attention under a mask.

Prompts of similar length share a block, and so do responses of similar length whose prompts have
similar lengths; in a response's block, its prompt's keys precede its own.

Legend: T packed tokens, b segments of a block, P prompt keys, M own tokens, H heads, d and e sizes
of a key and a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fastalign.models.attention import native, strips
from fastalign.models.attention.rows import Gather
from fastalign.models.attention.segments import ScoreForm, Segments

# Most scores for each head that padding may add for every segment that shares a block: a call of
# its own takes about as long.
MAX_PADDING = 2**12
# Limit of a block's scores for each head, unless one segment alone has more.
MAX_SCORES = 2**18

Bounds = tuple[int, int]  # the first, and one past the last


@dataclass
class Block:
    """Segments of similar lengths, padded to the longest.

    What a padding query attends to is not specified, but never nothing (its softmax would be NaN);
    its output is never read.

    Attributes:
        prompt_length: (b,) int64, keys of each segment's prompt; 0 for prompts.
        num_prompt: P, the length of the longest prompt.
        least_prompt: the length of the shortest.
        num_own: M, the length of the longest segment.
        num_segments: b.
        masks: cache of the masks, by their arguments.
    """

    prompt_length: Tensor
    num_prompt: int
    least_prompt: int
    num_own: int
    num_segments: int
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def first_key(self, query: int, window: int | None) -> int:
        """Return the first key that an own token, or one behind it, may attend to."""
        if window is None:
            return 0
        first = query - window + 1  # among the segment's own tokens
        return self.num_prompt + first if first >= 0 else max(0, self.least_prompt + first)

    def mask(self, window: int | None) -> Tensor | None:
        """Return (b, 1, M, P + M) bool, True where a query may attend to a key; None: causal."""
        # In a prompt's block padding follows every real key, so causality alone hides it.
        if self.num_prompt == 0 and (window is None or self.num_own <= window):
            return None
        if (window,) not in self.masks:
            every = (0, self.num_own), (0, self.num_prompt + self.num_own)
            self.masks[window,] = self._allowed(*every, window)[:, None]
        return self.masks[window,]

    def bias(
        self,
        queries: tuple[int, int],
        keys: tuple[int, int],
        window: int | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return (b or 1, 1, 1, w, c), 0 or -inf, of w own tokens and the last c of the keys.

        The keys before these may be attended to by all of the queries.
        """
        first = keys[0]
        if window is None or self.num_prompt + queries[1] - keys[0] <= window:
            equal = self.least_prompt == self.num_prompt
            first = max(first, self.num_prompt + queries[0] if equal else self.least_prompt)
        place = queries, (first, keys[1]), window, dtype
        if place not in self.masks:
            hidden = ~self._allowed(*place[:3])
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self.masks[place] = bias.masked_fill_(hidden, float("-inf"))[:, None, None]
        return self.masks[place]

    def _allowed(self, queries: Bounds, keys: Bounds, window: int | None) -> Tensor:
        """Return (b or 1, w, n) bool, True where a query may attend to a key."""
        device = self.prompt_length.device
        equal = self.least_prompt == self.num_prompt
        prompt = self.prompt_length[: 1 if equal else None, None, None]
        key = torch.arange(*keys, device=device)[None, None]
        of_own = key >= self.num_prompt
        position = torch.where(of_own, key - self.num_prompt + prompt, key)
        query = prompt + torch.arange(*queries, device=device)[None, :, None]
        allowed = (of_own | (key < prompt)) & (position <= query)
        return allowed if window is None else allowed & (query - position < window)


@dataclass
class _Members:
    """Members of one block: their numbers, and the most queries and keys."""

    numbers: list[int]
    scores: int
    queries: int
    keys: int

    def take(self, number: int, queries: int, keys: int) -> bool:
        """Add a segment unless too much of the block would be padding; return True if added."""
        most = max(self.queries, queries), max(self.keys, keys)
        scores, num = self.scores + queries * keys, len(self.numbers)
        padded = (num + 1) * most[0] * most[1]
        if padded - scores > num * MAX_PADDING or padded > MAX_SCORES:
            return False
        self.numbers.append(number)
        self.scores, (self.queries, self.keys) = scores, most
        return True


def assign_blocks(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Assign each segment of (queries, keys) to the first block that it fits into."""
    blocks: list[_Members] = []
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n][0] * sizes[n][1], n)):
        queries, keys = sizes[number]
        if not any(block.take(number, queries, keys) for block in blocks):
            blocks.append(_Members([number], queries * keys, queries, keys))
    return [block.numbers for block in blocks]


def padded(start: Tensor, length: Tensor, copy: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return (b, width) tokens from `start`, padded by the last, and copy numbers, -1 if padded."""
    offset = torch.arange(width)[None]
    index = start[:, None] + torch.minimum(offset, (length - 1)[:, None])
    return index, torch.where(offset < length[:, None], copy[:, None], -1)


class Blocks:
    """The attention of one batch: in native code, or by padded blocks.

    The blocks, which take milliseconds, are made when they are first needed, or at once where
    native code cannot run at all.
    """

    def __init__(self, segments: Segments, device: torch.device) -> None:
        self._segments, self._device = segments, device
        self.groups = native.groups_of(segments) if device.type == "cpu" else None
        if self.groups is None:
            _ = self.padded

    @cached_property
    def padded(self) -> PaddedBlocks:
        """The blocks."""
        with unset_fake_temporarily():  # an estimate of memory may be the first to ask for them
            return PaddedBlocks(self._segments, self._device)

    def attend(
        self,
        query: Tensor,  # (T, H, d)
        key: Tensor,  # (T, H_kv, d)
        value: Tensor,  # (T, H_kv, e)
        form: ScoreForm,
    ) -> Tensor:  # (T, H, e)
        """Compute the attention of the packed row."""
        if self.groups is not None and native.computes(query, key, value, form):
            return native.attend(query, key, value, self.groups, form)
        return self.padded.attend(query, key, value, form)


class PaddedBlocks:
    """The blocks of one batch."""

    def __init__(self, segments: Segments, device: torch.device) -> None:
        self.blocks: list[Block] = []
        queries, keys = [], []
        for members in self._members(segments):
            start, own_length = segments.start[members], segments.length[members]
            prompt_length = segments.prompt_length[members]
            num_prompt, num_own = int(prompt_length.max()), int(own_length.max())
            own = padded(start, own_length, torch.zeros_like(start), num_own)
            prompt = padded(
                segments.prompt_start[members], prompt_length, segments.number[members], num_prompt
            )
            queries.append(tuple(part.flatten() for part in own))
            keys.append(
                tuple(torch.cat(parts, 1).flatten() for parts in zip(prompt, own, strict=True))
            )
            self.blocks.append(
                Block(
                    prompt_length.to(device, non_blocking=True),
                    num_prompt,
                    int(prompt_length.min()),
                    num_own,
                    len(members),
                )
            )
        tokens, copies, of_keys, key_copies = (
            torch.cat(parts) for pieces in (queries, keys) for parts in zip(*pieces, strict=True)
        )
        self.queries = Gather.from_copies(tokens, copies, device)
        self.keys = Gather.from_copies(of_keys, key_copies, device)
        self.padding = torch.nonzero(copies < 0)[:, 0].to(device, non_blocking=True)

    @staticmethod
    def _members(segments: Segments) -> list[Tensor]:
        found = []
        for of_kind in (segments.number == 0, segments.number > 0):
            numbers = torch.nonzero(of_kind)[:, 0]
            own, prompt = segments.length[numbers], segments.prompt_length[numbers]
            sizes = list(zip(own.tolist(), (own + prompt).tolist(), strict=True))
            found += [numbers[members] for members in assign_blocks(sizes)]
        return found

    def attend(
        self,
        query: Tensor,  # (T, H, d)
        key: Tensor,  # (T, H_kv, d)
        value: Tensor,  # (T, H_kv, e)
        form: ScoreForm,
    ) -> Tensor:  # (T, H, e)
        """Compute the attention of the packed row, block by block."""
        if query.device.type == "cpu":
            output: Tensor = _Strips.apply(  # type: ignore[no-untyped-call]
                query, key, value, form.sinks, self, form
            )
            return output
        outputs = []
        gathered = [self.queries(query), self.keys(key), self.keys(value)]
        for rows in self.rows([*gathered, gathered[0]]):
            queries, keys, values = (part.transpose(1, 2) for part in rows[1:4])
            mask = rows.block.mask(form.window)
            part = dot_product_attention(queries, keys, values, mask, form)
            outputs.append(part.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.queries.places)

    def parts(self, rows: Tensor, *, of_keys: bool = False) -> list[Tensor]:
        """Return each block's part of gathered rows: (b, M, H, d), or of keys (b, P + M, H, d)."""
        sizes = [
            (block.num_segments, block.num_own + of_keys * block.num_prompt)
            for block in self.blocks
        ]
        parts = torch.split(rows, [num * width for num, width in sizes])
        return [part.view(*size, *part.shape[1:]) for part, size in zip(parts, sizes, strict=True)]

    def rows(self, gathered: Sequence[Tensor]) -> list[strips.Rows]:
        """Return each block's part of gathered queries, keys, values and outputs."""
        kinds = (False, True, True, False)
        parts = [self.parts(r, of_keys=kind) for r, kind in zip(gathered, kinds, strict=True)]
        return [strips.Rows(*each) for each in zip(self.blocks, *parts, strict=True)]

    def gathered(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return the blocks' rows of queries, keys and values."""
        by_kind = ((query, self.queries), (key, self.keys), (value, self.keys))
        return [rows.index_select(0, gather.index) for rows, gather in by_kind]


class _Strips(torch.autograd.Function):
    """The attention of a packed row on a CPU; saves the packed rows and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        blocks: PaddedBlocks,
        form: ScoreForm,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.blocks, ctx.form = blocks, form
        rows = blocks.gathered(query, key, value)
        output = rows[0].new_empty(*rows[0].shape[:2], value.shape[-1])
        strips.forward(blocks.rows([*rows, output]), form)
        return output.index_select(0, blocks.queries.places)

    @staticmethod
    def backward(ctx: Any, *of_output: Tensor) -> tuple[Tensor | None, ...]:
        blocks: PaddedBlocks = ctx.blocks
        *packed, sinks = ctx.saved_tensors
        rows = blocks.gathered(*packed)
        output = of_output[0].index_select(0, blocks.queries.index)
        output.index_fill_(0, blocks.padding, 0.0)
        gradients = [torch.empty_like(each) for each in rows]
        of_rows = blocks.rows([*gradients, output])
        of_sinks = None if sinks is None else torch.zeros_like(sinks)
        of_rows = [each._replace(sinks=of_sinks) for each in of_rows]
        strips.backward(blocks.rows([*rows, output]), of_rows, ctx.form)
        sums = (blocks.queries, blocks.keys, blocks.keys)
        found = [of.sum_copies(each) for of, each in zip(sums, gradients, strict=True)]
        return (*found, of_sinks, None, None)


def dot_product_attention(
    query: Tensor,  # (b, H, L, d)
    key: Tensor,  # (b, H_kv, K, d)
    value: Tensor,  # (b, H_kv, K, e)
    mask: Tensor | None,  # (b or 1, 1, L, K), bool or additive; None: causal, bottom-right aligned
    form: ScoreForm,  # its window is in the mask
) -> Tensor:  # (b, H, L, e)
    """Compute scaled dot products; explicitly where a softcap or sinks rule out fused kernels."""
    softcap, sinks = form.softcap, form.sinks
    num_shared = query.shape[1] // key.shape[1]
    # On a GPU, a mask with grouped heads would take the slow path that materialises the scores.
    explicit = softcap is not None or sinks is not None
    if num_shared > 1 and (explicit or query.is_cuda):
        key, value = (rows.repeat_interleave(num_shared, dim=1) for rows in (key, value))
        num_shared = 1
    if not explicit:
        assert mask is not None or query.shape[2] == key.shape[2], "is_causal aligns at the top"
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=form.scaling,
            enable_gqa=num_shared > 1,
        )
    scores = query @ key.transpose(-1, -2) * form.scale(query.shape[-1])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        num_queries, num_keys = scores.shape[-2:]
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_queries)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return scores.softmax(-1, dtype=wide)[..., : key.shape[2]].to(value.dtype) @ value
