"""Shared-prefix attention by PyTorch's FlexAttention: softcaps and float32 on a GPU.

The mask's blocks are computed on the host from the segments, so no (T, T) mask is ever built.

Legend: T packed tokens, H heads, d head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from fastalign.models.attention.segments import ScoreForm, Segments

BLOCK_TOKENS = 128


@functools.cache
def compiled_flex_attention() -> Callable[..., Any]:
    """Return FlexAttention, compiled once; uncompiled, it materialises every score."""
    return torch.compile(flex_attention, dynamic=True)


def visited_blocks(segments: Segments, block_tokens: int) -> Tensor:
    """Return (Q, K) bool: True if a block of queries may attend to any key of a block of keys."""
    num_blocks = -(-segments.num_tokens // block_tokens)
    visited = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    start, prompt_start = segments.start // block_tokens, segments.prompt_start // block_tokens
    stop = (segments.start + segments.length - 1) // block_tokens + 1
    prompt_end = segments.prompt_start + segments.prompt_length
    prompt_stop = (prompt_end + block_tokens - 1) // block_tokens
    prompt_stop = torch.where(segments.prompt_length > 0, prompt_stop, prompt_start)
    bounds = torch.stack([start, stop, prompt_start, prompt_stop], 1).tolist()
    for first, last, of_prompt, behind_prompt in bounds:
        visited[first:last, of_prompt:behind_prompt] = True
        visited[first:last, first:last] = True
    return visited.tril()


class Flex:
    """The mask of one batch."""

    def __init__(self, segments: Segments, device: torch.device) -> None:
        self._visited = visited_blocks(segments, BLOCK_TOKENS).to(device, non_blocking=True)
        self._num_tokens = segments.num_tokens
        group = (segments.number == 0).cumsum(0)
        offset = torch.arange(segments.num_tokens) - segments.per_token(segments.start)
        position = offset + segments.per_token(segments.prompt_length)
        self._group, self._number, self._position = (
            values.to(device, non_blocking=True)
            for values in (
                segments.per_token(group),
                segments.per_token(segments.number),
                position,
            )
        )
        self._masks: dict[int | None, BlockMask] = {}

    def mask(self, window: int | None) -> BlockMask:
        """Return the block mask for a sliding window."""
        if window not in self._masks:
            group, number, position = self._group, self._number, self._position

            def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                sees = (number[q] == number[k]) | (number[k] == 0)
                within = (q >= k) & (group[q] == group[k]) & sees
                return within if window is None else within & (position[q] - position[k] < window)

            counts = self._visited.sum(1, dtype=torch.int32)
            order = torch.argsort(
                self._visited.to(torch.int32), dim=1, descending=True, stable=True
            )
            self._masks[window] = BlockMask.from_kv_blocks(
                counts[None, None],
                order.to(torch.int32)[None, None],
                BLOCK_SIZE=BLOCK_TOKENS,
                mask_mod=allowed,
                seq_lengths=(self._num_tokens, self._num_tokens),
            )
        return self._masks[window]

    def attend(
        self,
        query: Tensor,  # (T, H, d)
        key: Tensor,  # (T, H_kv, d)
        value: Tensor,  # (T, H_kv, d)
        form: ScoreForm,
    ) -> Tensor:  # (T, H, e)
        """Compute the attention of the packed row in one call."""
        softcap, sinks = form.softcap, form.sinks

        def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            assert softcap is not None
            return softcap * torch.tanh(score / softcap)

        aux = {} if sinks is None else {"return_aux": AuxRequest(lse=True)}
        found = compiled_flex_attention()(
            *(rows.transpose(0, 1)[None] for rows in (query, key, value)),
            score_mod=None if softcap is None else capped,
            block_mask=self.mask(form.window),
            scale=form.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            **aux,
        )
        output: Tensor = found
        if sinks is not None:  # the softmax's denominator has the sink in it
            output, others = found
            rest = torch.sigmoid(others.lse - sinks[None, :, None])
            output = output * rest[..., None].to(output.dtype)
        return output[0].transpose(0, 1)
