"""The choice of an implementation of shared-prefix attention, and why one cannot run."""

from typing import Any, Literal, get_args

import torch

from fastalign.choices import AttentionChoice
from fastalign.models.attention.varlen import flash_attn_reason

AttentionName = Literal["sdpa", "flash_attn", "varlen", "flex"]
ATTENTIONS: tuple[AttentionName, ...] = get_args(AttentionName)
# Assumed order of speed, not measured.
ORDER_ON_CUDA: tuple[AttentionName, ...] = ("flash_attn", "varlen", "flex", "sdpa")
MAX_FLASH_HEAD_SIZE = 256


def head_size(config: Any) -> int:
    """Return the size of an attention head."""
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def attention_reason(
    name: AttentionName, device: torch.device, dtype: torch.dtype, config: Any = None
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
    if name == "varlen" and getattr(config, "attn_logit_softcapping", None) is not None:
        return f"it has no softcap, which {config.model_type} needs"
    return None


def choose_attention(
    wanted: AttentionChoice, device: torch.device, dtype: torch.dtype, config: Any
) -> AttentionName:
    """Return the named implementation, or the first usable one for `auto`.

    Raises:
        ValueError: if the name is unknown, or it cannot run; gives the reason.
    """
    if wanted != "auto":
        if wanted not in ATTENTIONS:
            known = ", ".join(("auto", *ATTENTIONS))
            raise ValueError(f"attention: expected one of {known}, got {wanted!r}")
        reason = attention_reason(wanted, device, dtype, config)
        if reason is not None:
            raise ValueError(f"attention: {wanted} cannot run: {reason}")
        return wanted
    usable = (n for n in ORDER_ON_CUDA if attention_reason(n, device, dtype, config) is None)
    return next(usable)
