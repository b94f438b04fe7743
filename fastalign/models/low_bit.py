"""Frozen weights in 4 bits, through bitsandbytes (NF4 of QLoRA, arXiv 2305.14314)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def nf4_options(dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """What `from_pretrained` takes so that all linear layers but the head are NF4.

    Args:
        dtype: of the products and of every other weight.
        device: where the weights are quantised and stay.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError(
            "model.lora.base: nf4 needs bitsandbytes: pip install 'fastalign[lora,low-bit]'"
        ) from None
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def is_quantised(layer: nn.Module) -> bool:
    """Whether the layer's weight is bitsandbytes' of 4 bits."""
    return hasattr(getattr(layer, "weight", None), "quant_state")


def keep_differentiable(model: nn.Module) -> None:
    """Forbids the form for inference that bitsandbytes gives weights on a CPU, at a first forward.

    It rounds their scales to bfloat16, has no gradient, and takes no width but multiples of 64.
    """
    for part in model.modules():
        if is_quantised(part):
            part.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def dense_layer(layer: Any, dtype: torch.dtype, delta: Tensor | None = None) -> nn.Module:
    """The layer that the model had before it was quantised, with the weights it computes with.

    Args:
        layer: bitsandbytes' layer.
        dtype: of the result.
        delta: (V, D) added to the weight in float32.
    """
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    weight = dequantize_bnb_weight(layer.weight).float()
    if delta is not None:
        weight += delta
    transposed = layer.source_cls is Conv1D
    with torch.device("meta"):
        if transposed:
            dense: nn.Module = Conv1D(layer.out_features, layer.in_features)
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    weight = (weight.t().contiguous() if transposed else weight).to(dtype)
    dense.weight = nn.Parameter(weight)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(dtype))
    return dense
