"""Shared-prefix attention by one variable-length flash call: flash-attn's, or PyTorch's own.

Each segment is a sequence of queries, used in place; its keys are gathered: those of its prompt,
then its own. Both kernels align causality at the bottom right, as a response needs it.

Legend: T packed tokens, S segments, M gathered keys, H heads, d head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.models.attention.rows import Gather, ranges
from fastalign.models.attention.segments import ScoreForm, Segments


class Bounds(NamedTuple):
    """Bounds of the sequences in packed queries and keys, as flash kernels take them.

    Attributes:
        queries: (S + 1,) int32.
        keys: (S + 1,) int32.
        max_queries: queries of the longest sequence.
        max_keys: keys of the sequence with most keys.
    """

    queries: Tensor
    keys: Tensor
    max_queries: int
    max_keys: int


# (query (T, H, d), key (M, H_kv, d), value (M, H_kv, d), bounds, form) -> (T, H, d); causal,
# bottom-right aligned.
VarlenKernel = Callable[[Tensor, Tensor, Tensor, Bounds, ScoreForm], Tensor]
# Keywords of `flash_attn_varlen_func` that its first releases did not have.
FLASH_KEYWORDS = ("window_size", "softcap", "deterministic")


@functools.cache
def parameters_of(function: Callable[..., Any]) -> Collection[str]:
    """Return the names of a library's function's parameters, which differ between releases."""
    return frozenset(inspect.signature(function).parameters)


def flash_attn_reason() -> str | None:
    """Return why the flash-attn package cannot be called, with a remedy; None if it can.

    The package is imported, since one that was built for another torch, or flash-attn-4 alone, is
    found by name and fails at its first use.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        (line, *_) = str(error).splitlines() or [type(error).__name__]
        return f"the package flash-attn cannot be imported (pip install 'fastalign[flash]'): {line}"
    missing = [n for n in FLASH_KEYWORDS if n not in parameters_of(flash_attn_varlen_func)]
    if missing:
        return (
            f"its flash_attn_varlen_func has no {', '.join(missing)} "
            "(pip install -U 'fastalign[flash]')"
        )
    return None


def flash_attn_kernel(
    query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, form: ScoreForm
) -> Tensor:
    """Call the flash-attn package; its deterministic backward keeps resumed runs bitwise equal."""
    from flash_attn import flash_attn_varlen_func

    output: Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=bounds.queries,
        cu_seqlens_k=bounds.keys,
        max_seqlen_q=bounds.max_queries,
        max_seqlen_k=bounds.max_keys,
        softmax_scale=form.scaling,
        causal=True,
        window_size=(-1, -1) if form.window is None else (form.window - 1, 0),
        softcap=form.softcap or 0.0,
        deterministic=True,
    )
    return output


def torch_kernel(
    query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, form: ScoreForm
) -> Tensor:
    """Call `torch.nn.attention.varlen`, which has no softcap."""
    from torch.nn.attention.varlen import varlen_attn

    assert form.softcap is None
    options: dict[str, Any] = {}
    # torch 2.11 has no such flag: it hands grouped heads to the kernel, which counts them itself.
    # Where the flag exists, they are refused without it.
    if "enable_gqa" in parameters_of(varlen_attn):
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    output = varlen_attn(
        query,
        key,
        value,
        *bounds,
        scale=form.scaling,
        window_size=(-1 if form.window is None else form.window - 1, 0),
        **options,
    )
    assert isinstance(output, Tensor)
    return output


KERNELS: dict[str, VarlenKernel] = {"flash_attn": flash_attn_kernel, "varlen": torch_kernel}


class Varlen:
    """The bounds and gathered keys of one batch."""

    def __init__(self, segments: Segments, device: torch.device) -> None:
        starts = torch.stack([segments.prompt_start, segments.start], 1).flatten()
        lengths = torch.stack([segments.prompt_length, segments.length], 1).flatten()
        copies = torch.stack([segments.number, torch.zeros_like(segments.number)], 1).flatten()
        self.keys = Gather.from_copies(
            ranges(starts, lengths), torch.repeat_interleave(copies, lengths), device
        )
        of_keys = segments.prompt_length + segments.length
        queries, keys = (
            torch.nn.functional.pad(each.cumsum(0), (1, 0)).to(
                device, torch.int32, non_blocking=True
            )
            for each in (segments.length, of_keys)
        )
        self.bounds = Bounds(queries, keys, int(segments.length.max()), int(of_keys.max()))

    def attend(
        self,
        kernel: VarlenKernel,
        query: Tensor,  # (T, H, d)
        key: Tensor,  # (T, H_kv, d)
        value: Tensor,  # (T, H_kv, d)
        form: ScoreForm,
    ) -> Tensor:  # (T, H, d)
        """Compute the attention of the packed row in one call."""
        return kernel(query, self.keys(key), self.keys(value), self.bounds, form)
