"""Shared-prefix attention: the function that transformers' layers call, and its implementations.

Each implementation is registered with transformers (`registered_name`). With a plan (a packed
row, or a step of sampling) the plan attends; without one (padded batches, transformers'
generation) it computes ordinary attention under transformers' own mask, softcap included.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastalign.compute import Compute
from fastalign.models.attention.blocks import dot_product_attention
from fastalign.models.attention.choice import ATTENTIONS, AttentionName, choose_attention
from fastalign.models.attention.plan import RowPlan
from fastalign.models.attention.segments import ScoreForm

# Arguments that change what attention computes, and that no implementation here supports.
REFUSED = ("position_bias", "cross_attention_states")


# Not traced by compiled layers (`--train.compile`): its blocks change with each batch.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,  # (b, H, L, d)
    key: Tensor,  # (b, H_kv, K, d)
    value: Tensor,  # (b, H_kv, K, e)
    attention_mask: Tensor | None,
    *,
    implementation: AttentionName,
    fastalign_plan: RowPlan | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention for a transformers attention layer, which calls this function.

    With `fastalign_plan` (a packed row, b = 1) the mask is ignored and `implementation` computes;
    without one it is ordinary attention. `options` are the layer's further arguments: `scaling`,
    `sliding_window`, `softcap`, `s_aux` (sinks), `dropout` and others.

    Raises:
        ValueError: if the layer passes something that is not implemented here (a position bias), or
            dropout.
    """
    for name in REFUSED:
        if options.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name}, which fastalign does not implement; "
                "use packing: padded"
            )
    dropout, window, softcap, sinks = (
        options.pop(name, None) for name in ("dropout", "sliding_window", "softcap", "s_aux")
    )
    if dropout:
        raise ValueError(f"{type(module).__name__}: expected attention dropout 0, got {dropout}")
    form = ScoreForm(options.get("scaling"), window, softcap, sinks)
    if fastalign_plan is None and softcap is None and sinks is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    if fastalign_plan is None:
        output = dot_product_attention(query, key, value, attention_mask, form)
        return output.transpose(1, 2).contiguous(), None
    # Rotary embeddings return float32 under autocast; SDPA would cast back, other kernels do not.
    if torch.is_autocast_enabled(query.device.type):
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(low), key.to(low), value.to(low)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer: Any = getattr(module, "layer_idx", None)
    return fastalign_plan.attend(implementation, query, key, value, form, layer)[None], None


def registered_name(name: AttentionName) -> str:
    """Return transformers' name of an implementation: a value of `attn_implementation`."""
    # transformers treats every name that contains "flash" or "sdpa" as a kernel of its own.
    return f"fastalign_{'blocks' if name == 'sdpa' else name.removeprefix('flash_')}"


def implementation_for(
    config: Any, compute: Compute, dtype: torch.dtype, needs: Collection[str] = ()
) -> str:
    """Return the value of `attn_implementation` for a model with parameters of `dtype`.

    `needs` are those of `RowPlan`.
    """
    products = compute.product_dtype or dtype
    name = choose_attention(compute.attention, compute.device, products, config, needs)
    return registered_name(name)


def takes_plans(model: Any) -> bool:
    """Return True if the model's attention is one of these, and not transformers' own."""
    return model.config._attn_implementation in map(registered_name, ATTENTIONS)


def attention_name(model: Any) -> str:
    """Return what computes a model's attention: one of `ATTENTIONS`, or transformers' own name."""
    registered = {registered_name(name): name for name in ATTENTIONS}
    implementation: str = model.config._attn_implementation
    return registered.get(implementation, implementation)


def register() -> None:
    """Register every implementation with transformers."""
    for name in ATTENTIONS:
        function = partial(shared_prefix_attention, implementation=name)
        AttentionInterface.register(registered_name(name), function)
        AttentionMaskInterface.register(registered_name(name), sdpa_mask)
