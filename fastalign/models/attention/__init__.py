"""Shared-prefix attention: what a transformers layer calls, and how it is computed.

Each implementation is registered with transformers (`registered_name`). With a plan (a packed
row) it attends segment by segment; without one (generation, padded batches) it is ordinary
attention under transformers' own mask, softcap included.
"""

from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastalign.batch.packed import PackedBatch
from fastalign.compute import Compute
from fastalign.models.attention.blocks import Blocks, dot_product_attention
from fastalign.models.attention.choice import (
    ATTENTIONS,
    AttentionName,
    attention_reason,
    choose_attention,
)
from fastalign.models.attention.flex import Flex
from fastalign.models.attention.segments import ScoreForm, segments_of
from fastalign.models.attention.varlen import KERNELS, Varlen

__all__ = [
    "ATTENTIONS",
    "AttentionName",
    "AttentionPlan",
    "ScoreForm",
    "attention_of",
    "attention_reason",
    "choose_attention",
    "implementation_for",
    "register",
    "registered_name",
]

# Arguments that change what attention computes, and that no form here implements.
REFUSED = ("s_aux", "position_bias", "cross_attention_states")


class AttentionPlan:
    """One batch's attention: planned once, on the host, for whichever implementation asks.

    Args:
        batch: on the device where attention runs.
    """

    def __init__(self, batch: PackedBatch) -> None:
        self._segments = segments_of(batch.layout)
        self._device = batch.input_ids.device

    @cached_property
    def _blocks(self) -> Blocks:
        return Blocks(self._segments, self._device)

    @cached_property
    def _varlen(self) -> Varlen:
        return Varlen(self._segments, self._device)

    @cached_property
    def _flex(self) -> Flex:
        return Flex(self._segments, self._device)

    def prepare(self, name: AttentionName) -> None:
        """Does now what is to be done on the host for an implementation."""
        getattr(self, {"sdpa": "_blocks", "flex": "_flex"}.get(name, "_varlen"))

    def attend(
        self,
        name: AttentionName,
        query: Tensor,  # (T, H, d)
        key: Tensor,  # (T, H_kv, d)
        value: Tensor,  # (T, H_kv, d)
        form: ScoreForm,
    ) -> Tensor:  # (T, H, d)
        """Attention of the packed row."""
        if name == "sdpa":
            return self._blocks.attend(query, key, value, form)
        if name == "flex":
            return self._flex.attend(query, key, value, form)
        return self._varlen.attend(KERNELS[name], query, key, value, form)


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
    *,
    implementation: AttentionName,
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
                f"{type(module).__name__} passes {name}, which fastalign does not implement; "
                "use packing: padded"
            )
    if dropout:
        raise ValueError(f"{type(module).__name__}: expected attention dropout 0, got {dropout}")
    form = ScoreForm(scaling, sliding_window, softcap)
    if fastalign_plan is None and softcap is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output, None
    if fastalign_plan is None:
        output = dot_product_attention(query, key, value, attention_mask, form)
        return output.transpose(1, 2).contiguous(), None
    # Rotary embeddings leave autocast's dtype; SDPA would return to it, other kernels would not.
    if torch.is_autocast_enabled(query.device.type):
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(low), key.to(low), value.to(low)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return fastalign_plan.attend(implementation, query, key, value, form)[None], None


def registered_name(name: AttentionName) -> str:
    """What transformers calls an implementation: a value of `attn_implementation`."""
    # transformers takes every name with "flash" in it for a kernel of its own.
    return f"fastalign_{name.removeprefix('flash_')}"


def implementation_for(config: Any, compute: Compute, dtype: torch.dtype) -> str:
    """Return the value of `attn_implementation` for a model with parameters of `dtype`.

    Raises:
        ValueError: if the implementation that `compute` names cannot run this model.
    """
    products = compute.product_dtype or dtype
    return registered_name(choose_attention(compute.attention, compute.device, products, config))


def attention_of(model: Any) -> str:
    """What computes a model's attention: one of `ATTENTIONS`, or transformers' own name for it."""
    registered = {registered_name(name): name for name in ATTENTIONS}
    implementation: str = model.config._attn_implementation
    return registered.get(implementation, implementation)


def register() -> None:
    """Makes every implementation known to transformers."""
    for name in ATTENTIONS:
        function = partial(shared_prefix_attention, implementation=name)
        AttentionInterface.register(registered_name(name), function)
        AttentionMaskInterface.register(registered_name(name), sdpa_mask)
