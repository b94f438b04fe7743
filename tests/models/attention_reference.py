"""Plain attention in the place of kernels that need a GPU: same arguments, any device."""

from typing import Any

import torch
from torch import Tensor


def softmax_attention(
    query: Tensor,  # (H, L, d)
    key: Tensor,  # (H_kv, K, d)
    value: Tensor,
    allowed: Tensor,  # (L, K) bool
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    shared = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
    scores = query @ key.transpose(1, 2)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    max_queries: int,
    max_keys: int,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Sequence by sequence; causal, aligned at the bottom right, as flash kernels are."""
    assert query_bounds.dtype == key_bounds.dtype == torch.int32
    outputs = []
    for number in range(len(query_bounds) - 1):
        q = query[query_bounds[number] : query_bounds[number + 1]].transpose(0, 1)
        k, v = (
            rows[key_bounds[number] : key_bounds[number + 1]].transpose(0, 1)
            for rows in (key, value)
        )
        assert q.shape[1] <= max_queries
        assert k.shape[1] <= max_keys
        row = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        column = torch.arange(k.shape[1])
        allowed = column <= row
        if window is not None:
            allowed &= row - column < window
        outputs.append(softmax_attention(q, k, v, allowed, scaling, softcap).transpose(0, 1))
    return torch.cat(outputs)


def flex_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score_mod: Any,
    block_mask: Any,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Its definition, dense: a score counts where its block is visited and the mask says so."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    length = query.shape[2]
    q, k = torch.arange(length)[:, None], torch.arange(length)
    zero = torch.zeros((), dtype=torch.int64)
    allowed = block_mask.mask_mod(zero, zero, q, k)
    visited = block_mask.to_dense()[0, 0].bool()
    size = block_mask.BLOCK_SIZE[0]
    allowed = allowed & visited[q // size, k // size]
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if score_mod is not None:
        scores = score_mod(scores, zero, zero, q, k)
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value
