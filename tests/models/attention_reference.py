"""Plain attention in the place of kernels that need a GPU: same arguments, any device."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput

from fastalign.models.attention.segments import ScoreForm
from fastalign.models.attention.varlen import Bounds


def softmax_attention(
    query: Tensor,  # (H, L, d)
    key: Tensor,  # (H_kv, K, d)
    value: Tensor,
    allowed: Tensor,  # (L, K) bool
    form: ScoreForm,
) -> Tensor:
    shared = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
    scaling = query.shape[-1] ** -0.5 if form.scaling is None else form.scaling
    scores = query @ key.transpose(1, 2) * scaling
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value


def varlen_reference(
    query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, form: ScoreForm
) -> Tensor:
    """Sequence by sequence; causal, aligned at the bottom right, as flash kernels are."""
    assert bounds.queries.dtype == bounds.keys.dtype == torch.int32
    outputs = []
    for number in range(len(bounds.queries) - 1):
        q = query[bounds.queries[number] : bounds.queries[number + 1]].transpose(0, 1)
        k, v = (
            rows[bounds.keys[number] : bounds.keys[number + 1]].transpose(0, 1)
            for rows in (key, value)
        )
        assert q.shape[1] <= bounds.max_queries
        assert k.shape[1] <= bounds.max_keys
        row = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        column = torch.arange(k.shape[1])
        allowed = column <= row
        if form.window is not None:
            allowed &= row - column < form.window
        outputs.append(softmax_attention(q, k, v, allowed, form).transpose(0, 1))
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
    return_aux: Any = None,
) -> Any:
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
    scores = scores.masked_fill(~allowed, -torch.inf)
    output = scores.softmax(-1) @ value
    return output if return_aux is None else (output, AuxOutput(lse=scores.logsumexp(-1)))
