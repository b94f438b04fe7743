"""Shared-prefix attention of a packed row on a CPU, in native code, without a copy of any row.

A thread takes a prompt with its responses and one key head, whose keys it holds in the order in
which products read them. It computes the scores of some queries at a time, in its cache.

Legend: T packed tokens, S segments, G groups, H query heads for h key heads, d and e sizes of a key
and a value.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.models.attention.segments import ScoreForm, Segments
from fastalign.ops.layers import launch, usable

DTYPES = (torch.float32, torch.bfloat16)


class Groups(NamedTuple):
    """Segments by their prompts.

    Attributes:
        segments: (S, 4) int64: start, length, prompt's start, prompt's length; a prompt before its
            responses.
        bounds: (G + 1,) int64, where each group begins.
    """

    segments: Tensor
    bounds: Tensor


def groups_of(segments: Segments) -> Groups | None:
    """Return the segments by their prompts; None where the kernel's tasks would share tokens."""
    with_prompt = segments.prompt_length > 0
    first = torch.where(with_prompt, segments.prompt_start, segments.start)
    order = torch.sort(first, stable=True).indices
    columns = (segments.start, segments.length, segments.prompt_start, segments.prompt_length)
    table = torch.stack([column[order] for column in columns], 1).contiguous()
    _, sizes = torch.unique_consecutive(first[order], return_counts=True)
    bounds = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    lengths = segments.length[order][bounds[:-1]].repeat_interleave(sizes)  # of the groups' first
    shared = table[:, 3] > 0
    starts_in_group = table[bounds[:-1], 0].repeat_interleave(sizes)
    whole = (table[:, 3] == lengths) & (table[:, 2] == starts_in_group)
    return Groups(table, bounds) if bool((whole | ~shared).all()) else None


def computes(query: Tensor, key: Tensor, value: Tensor, form: ScoreForm) -> bool:
    """Return True if native code computes this attention."""
    same = query.dtype == key.dtype == value.dtype
    plain = form.softcap is None and form.sinks is None
    return plain and same and usable(query, key, value, dtypes=DTYPES)


def attend(query: Tensor, key: Tensor, value: Tensor, groups: Groups, form: ScoreForm) -> Tensor:
    """Return the attention of a packed row.

    Args:
        query: (T, H, d) float32 or bfloat16, on a CPU.
        key: (T, h, d), of the same dtype.
        value: (T, h, e), of the same dtype.
        groups: its segments; every token is in one.
        form: scale and window of the scores.

    Returns:
        (T, H, e) in the same dtype, computed in float32, differentiable in all three.
    """
    found: Tensor = _Attention.apply(query, key, value, groups, form)  # type: ignore[no-untyped-call]
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Groups, form: ScoreForm
    ) -> Tensor:
        rows = [in_float32(each) for each in (query, key, value)]
        output = rows[0].new_empty(*query.shape[:2], value.shape[2])
        launch("attention_forward", [*rows, *_arguments(rows, groups, form), output])
        ctx.save_for_backward(query, key, value)
        ctx.groups, ctx.form = groups, form
        return output.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved = ctx.saved_tensors
        rows = [in_float32(each) for each in saved]
        found = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in rows]
        of_output = gradients[0].float().contiguous()
        arguments = _arguments(rows, ctx.groups, ctx.form)
        launch("attention_backward", [*rows, *arguments, of_output, *found])
        return (*(each.to(saved[0].dtype) for each in found), None, None)


def in_float32(rows: Tensor) -> Tensor:
    """Return rows (T, H, d) in float32 whose heads lie next to each other in memory."""
    rows = rows.float()
    return rows if rows.stride()[1:] == (rows.shape[2], 1) else rows.contiguous()


def _arguments(rows: list[Tensor], groups: Groups, form: ScoreForm) -> list[Any]:
    query, key, value = rows
    sizes = [query.shape[1], key.shape[1], key.shape[2], value.shape[2]]
    return [
        *(ctypes.c_int64(number) for number in (*(each.stride(0) for each in rows), *sizes)),
        groups.segments,
        groups.bounds,
        ctypes.c_int64(len(groups.bounds) - 1),
        ctypes.c_float(form.scale(query.shape[2])),
        ctypes.c_int64(form.window or 0),
    ]
