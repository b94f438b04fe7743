"""Shared-prefix attention, registered with transformers as `fastalign_shared_prefix`.

With a plan (a packed row) it attends block by block; without one (generation, padded batches) it is
ordinary attention under transformers' own mask, softcap included.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastalign.models.attention_plan import AttentionPlan

NAME = "fastalign_shared_prefix"
# Arguments that change what attention computes, and that no form here implements.
REFUSED = ("s_aux", "position_bias", "cross_attention_states")


def attend(
    query: Tensor,  # (b, H, L, d)
    key: Tensor,  # (b, H, K, d)
    value: Tensor,  # (b, H, K, d)
    mask: Tensor | None,  # (b or 1, 1, L, K), bool or additive; None: causal, bottom-right aligned
    scaling: float | None,
    softcap: float | None,
) -> Tensor:  # (b, H, L, d)
    """Scaled dot-product attention; written out where a softcap rules out the fused kernels."""
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = query @ key.transpose(-1, -2)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
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


def attend_by_plan(
    plan: AttentionPlan,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, H, T, d)
    value: Tensor,  # (1, H, T, d)
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:  # (1, T, H, d)
    """Attention of a packed row, block by block."""
    num_heads = query.shape[1]
    outputs = []
    for block in plan.blocks:
        num_groups, length = block.shape

        def gather(row: Tensor, block: Any = block, b: int = num_groups, n: int = length) -> Tensor:
            picked = row[0].index_select(1, block.index)  # (H, b * L, d)
            return picked.view(row.shape[1], b, n, row.shape[3]).transpose(0, 1)

        output = attend(
            gather(query), gather(key), gather(value), block.mask(window), scaling, softcap
        )
        outputs.append(output.transpose(1, 2).reshape(num_groups * length, num_heads, -1))
    rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return rows.index_select(0, plan.inverse)[None]


# Its blocks change with each batch; compiled layers (`--train.compile`) call it as it is.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,  # (b, H, L, d)
    key: Tensor,  # (b, H_kv, K, d)
    value: Tensor,  # (b, H_kv, K, d)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    fastalign_plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that a transformers attention layer calls.

    Raises:
        ValueError: the layer passes something that is not implemented here (attention sinks, a
            position bias), or dropout.
    """
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name}, which {NAME} does not implement; "
                "use packing: padded"
            )
    if dropout:
        raise ValueError(f"{type(module).__name__}: expected attention dropout 0, got {dropout}")
    if fastalign_plan is None and softcap is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output, None
    num_shared = query.shape[1] // key.shape[1]
    if num_shared > 1:
        key = key.repeat_interleave(num_shared, dim=1)
        value = value.repeat_interleave(num_shared, dim=1)
    if fastalign_plan is None:
        output = attend(query, key, value, attention_mask, scaling, softcap)
        return output.transpose(1, 2).contiguous(), None
    return attend_by_plan(fastalign_plan, query, key, value, scaling, sliding_window, softcap), None


def register() -> None:
    """Makes `attn_implementation="fastalign_shared_prefix"` known to transformers."""
    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
