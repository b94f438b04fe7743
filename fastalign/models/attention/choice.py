"""The choice of an implementation of shared-prefix attention, and why one cannot run."""

from collections.abc import Collection
from typing import Any, Literal, get_args

import torch

from fastalign.choices import AttentionChoice
from fastalign.models.attention.varlen import flash_attn_reason

AttentionName = Literal["sdpa", "flash_attn", "varlen", "flex"]
ATTENTIONS: tuple[AttentionName, ...] = get_args(AttentionName)
# Assumed order of speed, not measured.
ORDER_ON_CUDA: tuple[AttentionName, ...] = ("flash_attn", "varlen", "flex", "sdpa")
MAX_FLASH_HEAD_SIZE = 256
# What the kernels of variable length lack, of what a model's attention may need.
UNSUPPORTED = {
    "flash_attn": ("sinks", "value_width"),
    "varlen": ("softcap", "sinks", "value_width"),
}


def head_size(config: Any) -> int:
    """Return the size of an attention head, of the layer where it is largest."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(text, "per_layer_config", None) or [text]
    sizes = [getattr(layer, "head_dim", None) or 0 for layer in layers]
    return int(max(sizes) or text.hidden_size // text.num_attention_heads)


def attention_reason(
    name: AttentionName,
    device: torch.device,
    dtype: torch.dtype,
    config: Any = None,
    needs: Collection[str] = (),
) -> str | None:
    """Return why an implementation cannot run, with a remedy; None if it can.

    Without a `config` only what does not depend on a model is checked.
    """
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs a GPU, and the device is {device}"
    if name == "flex":
        return None
    if name == "flash_attn" and (reason := flash_attn_reason()) is not None:
        return reason
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "it needs a GPU of compute capability 8.0 or newer"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bf16 (--train.precision bf16), and computes in {dtype}"
    if config is None:
        return None
    if head_size(config) > MAX_FLASH_HEAD_SIZE:
        return f"it needs heads of at most {MAX_FLASH_HEAD_SIZE}, and they are {head_size(config)}"
    missing = next((need for need in UNSUPPORTED[name] if need in needs), None)
    if missing is not None:
        return f"it has no {missing}, which {config.model_type} needs"
    return None


def choose_attention(
    wanted: AttentionChoice,
    device: torch.device,
    dtype: torch.dtype,
    config: Any,
    needs: Collection[str] = (),
) -> AttentionName:
    """Return the named implementation, or the first usable one for `auto`.

    Raises:
        ValueError: if the name is unknown, or it cannot run; gives the reason.
    """
    if wanted != "auto":
        if wanted not in ATTENTIONS:
            known = ", ".join(("auto", *ATTENTIONS))
            raise ValueError(f"attention: expected one of {known}, got {wanted!r}")
        reason = attention_reason(wanted, device, dtype, config, needs)
        if reason is not None:
            raise ValueError(f"attention: {wanted} cannot run: {reason}")
        return wanted
    return next(
        name
        for name in ORDER_ON_CUDA
        if attention_reason(name, device, dtype, config, needs) is None
    )
