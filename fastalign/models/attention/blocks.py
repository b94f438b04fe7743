"""Shared-prefix attention by scaled dot products of a few padded blocks: any device, any dtype.

Prompts of similar length share a block, and so do responses of similar length whose prompts have
similar lengths; in a response's block, its prompt's keys precede its own.

Legend: T packed tokens, b segments of a block, P prompt keys, M own tokens, H heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.models.attention.rows import Gather
from fastalign.models.attention.segments import ScoreForm, Segments

# At least this share of a block's scores belongs to real tokens, unless its segments differ by at
# most MIN_FILL_TOKENS: then padding costs little.
MIN_FILL = 0.75
MIN_FILL_TOKENS = 8
# Limit of a block's scores for each head, unless one segment alone has more.
MAX_SCORES = 2**24


@dataclass
class Block:
    """Segments of similar lengths, padded to the longest.

    Attributes:
        prompt_length: (b,) int64, keys of each segment's prompt; 0 for prompts.
        own_length: (b,) int64, tokens of each segment.
        num_prompt: P, the length of the longest prompt.
        num_own: M, the length of the longest segment.
        masks: cache of the masks, by sliding window.
    """

    prompt_length: Tensor
    own_length: Tensor
    num_prompt: int
    num_own: int
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor | None:
        """Return (b, 1, M, P + M) bool, True where a query may attend to a key; None: plain causal.

        A padding query has the position of its segment's last token, so that no row is empty (its
        softmax would be NaN); its output is never read.
        """
        if window not in self.masks:
            self.masks[window] = self._mask(window)
        return self.masks[window]

    def _mask(self, window: int | None) -> Tensor | None:
        # In a prompt's block padding follows every real key, so causality alone hides it.
        if self.num_prompt == 0 and (window is None or self.num_own <= window):
            return None
        device = self.own_length.device
        prompt, own = self.prompt_length[:, None], self.own_length[:, None]
        of_prompt = torch.arange(self.num_prompt, device=device).expand(len(prompt), -1)
        of_own = torch.arange(self.num_own, device=device).expand(len(own), -1)
        exists = torch.cat([of_prompt < prompt, of_own < own], 1)[:, None, :]
        key = torch.cat([of_prompt, prompt + of_own], 1)[:, None, :]
        query = (prompt + torch.minimum(of_own, own - 1))[:, :, None]
        allowed = exists & (key <= query)
        if window is not None:
            allowed &= query - key < window
        return allowed[:, None]


@dataclass
class _Members:
    """Members of one block: their numbers, and the smallest and largest (queries, keys)."""

    numbers: list[int]
    scores: int
    least: tuple[int, int]
    most: tuple[int, int]

    def take(self, number: int, queries: int, keys: int) -> bool:
        """Add a segment unless too much of the block would be padding; return True if added."""
        least = min(self.least[0], queries), min(self.least[1], keys)
        most = max(self.most[0], queries), max(self.most[1], keys)
        padded_scores = (len(self.numbers) + 1) * most[0] * most[1]
        near = max(most[0] - least[0], most[1] - least[1]) <= MIN_FILL_TOKENS
        full = self.scores + queries * keys >= MIN_FILL * padded_scores
        if not (near or full) or padded_scores > MAX_SCORES:
            return False
        self.numbers.append(number)
        self.scores, self.least, self.most = self.scores + queries * keys, least, most
        return True


def assign_blocks(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Assign each segment of (queries, keys) to the first block that it fits into."""
    blocks: list[_Members] = []
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n][0] * sizes[n][1], n)):
        queries, keys = sizes[number]
        if not any(block.take(number, queries, keys) for block in blocks):
            blocks.append(_Members([number], queries * keys, sizes[number], sizes[number]))
    return [block.numbers for block in blocks]


def padded(start: Tensor, length: Tensor, copy: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return (b, width) tokens from `start`, padded by the last, and copy numbers, -1 if padded."""
    offset = torch.arange(width)[None]
    index = start[:, None] + torch.minimum(offset, (length - 1)[:, None])
    return index, torch.where(offset < length[:, None], copy[:, None], -1)


class Blocks:
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
                    own_length.to(device, non_blocking=True),
                    num_prompt,
                    num_own,
                )
            )
        self.queries, self.keys = (
            Gather.from_copies(
                torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces]), device
            )
            for pieces in (queries, keys)
        )

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
        value: Tensor,  # (T, H_kv, d)
        form: ScoreForm,
    ) -> Tensor:  # (T, H, d)
        """Compute the attention of the packed row, block by block."""
        sizes = [(len(b.own_length), b.num_own, b.num_prompt + b.num_own) for b in self.blocks]
        of_queries = torch.split(self.queries(query), [b * m for b, m, _ in sizes])
        of_keys, of_values = (
            torch.split(self.keys(rows), [b * k for b, _, k in sizes]) for rows in (key, value)
        )
        outputs = []
        for number, (block, (b, m, k)) in enumerate(zip(self.blocks, sizes, strict=True)):
            output = dot_product_attention(
                _heads_first(of_queries[number], b, m),
                _heads_first(of_keys[number], b, k),
                _heads_first(of_values[number], b, k),
                block.mask(form.window),
                form,
            )
            outputs.append(output.transpose(1, 2).reshape(b * m, *query.shape[1:]))
        return torch.cat(outputs).index_select(0, self.queries.places)


def _heads_first(rows: Tensor, num: int, length: int) -> Tensor:
    """Reshape (b * L, H, d) to (b, H, L, d)."""
    return rows.view(num, length, *rows.shape[1:]).transpose(1, 2)


def dot_product_attention(
    query: Tensor,  # (b, H, L, d)
    key: Tensor,  # (b, H_kv, K, d)
    value: Tensor,  # (b, H_kv, K, d)
    mask: Tensor | None,  # (b or 1, 1, L, K), bool or additive; None: causal, bottom-right aligned
    form: ScoreForm,  # its window is in the mask
) -> Tensor:  # (b, H, L, d)
    """Compute scaled dot-product attention; explicitly where a softcap rules out fused kernels."""
    softcap = form.softcap
    num_shared = query.shape[1] // key.shape[1]
    # On a GPU, a mask with grouped heads would take the slow path that materialises the scores.
    if num_shared > 1 and (softcap is not None or query.is_cuda):
        key, value = (rows.repeat_interleave(num_shared, dim=1) for rows in (key, value))
        num_shared = 1
    if softcap is None:
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
    return scores.softmax(-1, dtype=wide).to(value.dtype) @ value
