"""Attention of padded blocks on a CPU: plain products, some queries and heads at a time.

PyTorch's fused attention on a CPU computes the scores that a mask hides as well, and its bfloat16
backward takes longer than that of float32. Here a strip of queries reads no key behind its last
query's, and the backward computes a strip's scores again: memory grows with the tokens, not with
their square.

Legend: b segments, P prompt keys, M own tokens, K = P + M keys, H = h * g query heads for h key
heads, d and e sizes of a key and a value; a strip has w queries, n keys and a key heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastalign.models.attention.segments import ScoreForm

if TYPE_CHECKING:
    from fastalign.models.attention.blocks import Block

STRIP_QUERIES = 128  # more compute more scores that causality hides, fewer make slow products
STRIP_SCORES = 2**19  # as many key heads share a strip as this allows, at least one


class Rows(NamedTuple):
    """A block and its rows, or their gradients."""

    block: Block
    query: Tensor  # (b, M, H, d)
    key: Tensor  # (b, K, h, d)
    value: Tensor  # (b, K, h, e)
    output: Tensor  # (b, M, H, e)
    sinks: Tensor | None = None  # (H,), the same of every block; of gradients, their sum


@dataclass(frozen=True)
class Strip:
    """Some queries and key heads of a block.

    Attributes:
        block: the block.
        queries: bounds of the queries.
        keys: bounds of the keys that any of them may attend to.
        heads: bounds of the key heads.
        num_shared: g.
        form: transformation of the scores.
    """

    block: Block
    queries: tuple[int, int]
    keys: tuple[int, int]
    heads: tuple[int, int]
    num_shared: int
    form: ScoreForm

    @property
    def num_queries(self) -> int:
        """Number of queries, w."""
        return self.queries[1] - self.queries[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the scores, (b * a, g * w, n)."""
        queries, keys, heads = (
            last - first for first, last in (self.queries, self.keys, self.heads)
        )
        return self.block.num_segments * heads, self.num_shared * queries, keys

    def of_queries(self, rows: Tensor) -> Tensor:
        """Return the strip of queries, outputs or their gradients, (b, a, g, w, d)."""
        (start, stop), (first, last) = self.queries, self.heads
        by_head = rows.view(*rows.shape[:2], -1, self.num_shared, rows.shape[3])
        return by_head[:, start:stop, first:last].permute(0, 2, 3, 1, 4)

    def of_keys(self, rows: Tensor) -> Tensor:
        """Return the strip of keys, values or their gradients, (b, a, n, d)."""
        (start, stop), (first, last) = self.keys, self.heads
        return rows[:, start:stop, first:last].transpose(1, 2)

    def matrices(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (b * a, g * w, d), keys (b * a, n, d) and values (b * a, n, e)."""
        query = self.of_queries(rows.query).flatten(2, 3).flatten(0, 1)
        return query, self.of_keys(rows.key).flatten(0, 1), self.of_keys(rows.value).flatten(0, 1)

    def scores(self, memory: Tensor) -> Tensor:
        """Return the first elements of `memory` in the shape of the scores."""
        num, queries, keys = self.shape
        return memory[: num * queries * keys].view(self.shape)

    def sums_of_heads(self, rows: Tensor) -> Tensor:
        """Return the sums of each head's rows (b * a, g * w), (a, g)."""
        return rows.view(self.block.num_segments, -1, self.num_shared, self.num_queries).sum((0, 3))

    def of_heads(self, values: Tensor) -> Tensor:
        """Return the value of each row's head (b * a, g * w), of (H,)."""
        (first, last), num = self.heads, self.block.num_segments
        mine = values.view(-1, self.num_shared)[None, first:last, :, None]
        return mine.expand(num, -1, -1, self.num_queries).reshape(num * (last - first), -1)

    def probabilities(self, query: Tensor, key: Tensor, out: Tensor) -> Tensor | None:
        """Write the softmax of the scores into `out`; return tanh(score / softcap), if capped."""
        scale, softcap, tanh = self.form.scale(query.shape[-1]), self.form.softcap, None
        product(query, key.transpose(1, 2), scale if softcap is None else scale / softcap, out)
        if softcap is not None:
            tanh = out.tanh_().clone()
            out *= softcap
        bias = self.block.bias(self.queries, self.keys, self.form.window, out.dtype)
        (*_, queries, columns), keys = bias.shape, out.shape[2]
        by_head = out.view(self.block.num_segments, -1, self.num_shared, queries, keys)
        by_head[..., keys - columns :].add_(bias)
        rest = None
        if self.form.sinks is not None:  # what the sinks leave to the keys
            rest = torch.sigmoid(out.logsumexp(-1) - self.of_heads(self.form.sinks.to(out.dtype)))
        torch.softmax(out, -1, out=out)
        if rest is not None:
            out *= rest[..., None]
        return tanh


def product(left: Tensor, right: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Return left @ right * scale, rounded once."""
    if out is None:
        out = left.new_empty(*left.shape[:2], right.shape[2])
    return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)


def strips_of(rows: Rows, form: ScoreForm) -> Iterator[Strip]:
    """Yield the strips of a block."""
    block, num_heads = rows.block, rows.key.shape[2]
    num_shared = rows.query.shape[2] // num_heads
    width = -(-block.num_own // -(-block.num_own // STRIP_QUERIES))
    scores = block.num_segments * num_shared * width * (block.num_prompt + block.num_own)
    step = max(1, STRIP_SCORES // scores)
    for start in range(0, block.num_own, width):
        queries = start, min(start + width, block.num_own)
        keys = block.first_key(start, form.window), block.num_prompt + queries[1]
        for head in range(0, num_heads, step):
            yield Strip(block, queries, keys, (head, min(head + step, num_heads)), num_shared, form)


def planned(blocks: Sequence[Rows], form: ScoreForm) -> tuple[list[list[Strip]], int]:
    """Return the strips of each block, and the most scores of a strip."""
    found = [list(strips_of(rows, form)) for rows in blocks]
    most = max(math.prod(strip.shape) for strips in found for strip in strips)
    if isinstance(blocks[0].query, FakeTensor):
        found = list(largest_strips(blocks, found))
    return found, most


def largest_strips(blocks: Sequence[Rows], plan: Sequence[list[Strip]]) -> Iterator[list[Strip]]:
    """Yield each block's largest strip, none for a block of a size that was there before.

    It tells the memory of tensors without data: no strip leaves anything but its bias, which is
    made for every block.
    """
    sizes = set()
    for rows, strips in zip(blocks, plan, strict=True):
        block, strip = rows.block, max(strips, key=lambda strip: math.prod(strip.shape))
        block.bias(strip.queries, strip.keys, strip.form.window, rows.query.dtype)
        size = block.num_segments, block.num_own, block.num_prompt, block.least_prompt
        yield [] if size in sizes else [strip]
        sizes.add(size)


def forward(blocks: Sequence[Rows], form: ScoreForm) -> None:
    """Write every block's output."""
    plan, most = planned(blocks, form)
    memory = blocks[0].query.new_empty(most)
    for rows, strips in zip(blocks, plan, strict=True):
        for strip in strips:
            strip_output(strip, rows, memory)


def strip_output(strip: Strip, rows: Rows, memory: Tensor) -> None:
    """Write the output of a strip."""
    query, key, value = strip.matrices(rows)
    scores = strip.scores(memory)
    strip.probabilities(query, key, scores)
    output = strip.of_queries(rows.output)
    output.copy_(product(scores, value).view(output.shape))


def backward(blocks: Sequence[Rows], gradients: Sequence[Rows], form: ScoreForm) -> None:
    """Write every block's gradients; `gradients` has that of the output."""
    plan, most = planned(blocks, form)
    memory = blocks[0].query.new_empty(2, most)
    for rows, of_rows, strips in zip(blocks, gradients, plan, strict=True):
        block_gradients(strips, rows, of_rows, memory)


def block_gradients(strips: Sequence[Strip], rows: Rows, of_rows: Rows, memory: Tensor) -> None:
    """Write a block's gradients."""
    # Strips of queries share keys, and keys before every query's window are in no strip.
    several = any(strip.queries[0] > 0 or strip.keys[0] > 0 for strip in strips)
    wide = torch.promote_types(rows.key.dtype, torch.float32)
    of_keys = (of_rows.key, of_rows.value)
    sums = [torch.zeros_like(r, dtype=wide) if several else r for r in of_keys]
    for strip in strips:
        of_query, *parts = strip_gradients(strip, rows, of_rows, memory)
        query = strip.of_queries(of_rows.query)
        query.copy_(of_query.view(query.shape))
        for total, part in zip(map(strip.of_keys, sums), parts, strict=True):
            add = total.add_ if several else total.copy_
            add(part.view(total.shape))
        del of_query, parts, part  # before those of the next strip
    if several:
        of_rows.key.copy_(sums[0])
        of_rows.value.copy_(sums[1])


def strip_gradients(
    strip: Strip, rows: Rows, of_rows: Rows, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `strip.matrices`, given that of the output; add that of sinks."""
    query, key, value = strip.matrices(rows)
    output = strip.of_queries(of_rows.output).flatten(2, 3).flatten(0, 1)
    scores, of_scores = (strip.scores(each) for each in memory)
    tanh = strip.probabilities(query, key, scores)
    of_value = product(scores.transpose(1, 2), output)
    product(output, value.transpose(1, 2), out=of_scores)
    if of_rows.sinks is not None:
        of_heads = (scores.sum(-1) - 1) * (scores * of_scores).sum(-1)
        of_sinks = of_rows.sinks.view(-1, strip.num_shared)[slice(*strip.heads)]
        of_sinks += strip.sums_of_heads(of_heads)
    torch._softmax_backward_data(of_scores, scores, -1, scores.dtype, grad_input=of_scores)
    if tanh is not None:
        of_scores *= 1 - tanh.square()
    scale = strip.form.scale(query.shape[-1])
    of_query = product(of_scores, key, scale)
    return of_query, product(of_scores.transpose(1, 2), query, scale), of_value
