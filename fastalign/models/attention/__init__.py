"""Shared-prefix attention: the function that transformers' layers call, and its implementations.

Each implementation is registered with transformers (`registered_name`). With a plan (a packed
row) it attends segment by segment; without one (generation, padded batches) it computes ordinary
attention under transformers' own mask, softcap included.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastalign.batch.packed import PackedBatch
from fastalign.compute import Compute
from fastalign.models.attention.blocks import Blocks, dot_product_attention
from fastalign.models.attention.choice import ATTENTIONS, AttentionName, choose_attention
from fastalign.models.attention.flex import Flex
from fastalign.models.attention.segments import ScoreForm, row_segments
from fastalign.models.attention.varlen import KERNELS, Varlen

# Arguments that change what attention computes, and that no implementation here supports.
REFUSED = ("s_aux", "position_bias", "cross_attention_states")


class AttentionPlan:
    """One batch's attention, planned once on the host and shared by all layers."""

    def __init__(self, batch: PackedBatch) -> None:
        self._segments = row_segments(batch.layout)
        self._device = batch.input_ids.device
        self._prepared: dict[type, Any] = {}

    def prepare(self, name: AttentionName) -> Any:
        """Do the host's work for an implementation now, rather than at the first `attend`."""
        kind: type = {"sdpa": Blocks, "flex": Flex}.get(name, Varlen)
        if kind not in self._prepared:
            self._prepared[kind] = kind(self._segments, self._device)
        return self._prepared[kind]

    def attend(
        self,
        name: AttentionName,
        query: Tensor,  # (T, H, d)
        key: Tensor,  # (T, H_kv, d)
        value: Tensor,  # (T, H_kv, d)
        form: ScoreForm,
    ) -> Tensor:  # (T, H, d)
        """Compute the attention of the packed row."""
        kernel = (KERNELS[name],) if name in KERNELS else ()
        output: Tensor = self.prepare(name).attend(*kernel, query, key, value, form)
        return output


# Not traced by compiled layers (`--train.compile`): its blocks change with each batch.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,  # (b, H, L, d)
    key: Tensor,  # (b, H_kv, K, d)
    value: Tensor,  # (b, H_kv, K, d)
    attention_mask: Tensor | None,
    *,
    implementation: AttentionName,
    fastalign_plan: AttentionPlan | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention for a transformers attention layer, which calls this function.

    With `fastalign_plan` (a packed row, b = 1) the mask is ignored and `implementation` computes;
    without one it is ordinary attention. `options` are the layer's further arguments: `scaling`,
    `sliding_window`, `softcap`, `dropout` and others.

    Raises:
        ValueError: if the layer passes something that is not implemented here (attention sinks, a
            position bias), or dropout.
    """
    for name in REFUSED:
        if options.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name}, which fastalign does not implement; "
                "use packing: padded"
            )
    dropout, window, softcap = (
        options.pop(name, None) for name in ("dropout", "sliding_window", "softcap")
    )
    if dropout:
        raise ValueError(f"{type(module).__name__}: expected attention dropout 0, got {dropout}")
    form = ScoreForm(options.get("scaling"), window, softcap)
    if fastalign_plan is None and softcap is None:
        if query.shape[2] == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
            return one_query_attention(query, key, value, attention_mask, form), None
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
    return fastalign_plan.attend(implementation, query, key, value, form)[None], None


def one_query_attention(
    query: Tensor,  # (b, H, 1, d)
    key: Tensor,  # (b, H_kv, K, d)
    value: Tensor,  # (b, H_kv, K, d)
    mask: Tensor | None,  # (b or 1, 1, 1, K)
    form: ScoreForm,
) -> Tensor:  # (b, 1, H, d)
    """Compute the attention of one token a row; a decoding step is mostly this.

    Heads that share keys are the queries of one head, so that no key is copied or read twice.
    """
    batch, heads, _, size = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], size)
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=form.scaling)
    return output.reshape(batch, 1, heads, value.shape[-1])


def registered_name(name: AttentionName) -> str:
    """Return transformers' name of an implementation: a value of `attn_implementation`."""
    # transformers treats every name that contains "flash" as a kernel of its own.
    return f"fastalign_{name.removeprefix('flash_')}"


def implementation_for(config: Any, compute: Compute, dtype: torch.dtype) -> str:
    """Return the value of `attn_implementation` for a model with parameters of `dtype`."""
    products = compute.product_dtype or dtype
    return registered_name(choose_attention(compute.attention, compute.device, products, config))


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
