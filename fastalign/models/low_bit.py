"""Frozen weights in 4 bits through bitsandbytes: NF4 of QLoRA (arXiv 2305.14314)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def nf4_options(dtype: torch.dtype, device: torch.device | str, path: str | Path) -> dict[str, Any]:
    """Return options of `from_pretrained` that quantise all linear layers but the head to NF4.

    `dtype` is that of the products and of every other weight; `path` is the model's.

    Raises:
        ValueError: if bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError(
            "model.lora.base: nf4 needs bitsandbytes: pip install 'fastalign[lora,low-bit]' "
            f"(for {path})"
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
    """Return True if the layer's weight is one of bitsandbytes in 4 bits."""
    return hasattr(getattr(layer, "weight", None), "quant_state")


def keep_differentiable(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking weights on a CPU for inference at the first forward.

    That form rounds their scales to bfloat16, has no gradient, and requires widths that are
    multiples of 64.
    """
    for part in model.modules():
        if is_quantised(part):
            part.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def dense_layer(layer: Any, dtype: torch.dtype, delta: Tensor | None = None) -> nn.Module:
    """Return a quantised layer as the dense layer that it replaced, with dequantised weights.

    `delta` (V, D) is added to the weight in float32; the result has `dtype`.
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
