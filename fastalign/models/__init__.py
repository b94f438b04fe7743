"""Models: loading, the packed forward, the head."""

from fastalign.models.head import Head, lm_head
from fastalign.models.load import check_packable, find_device, load_policy, save_model
from fastalign.models.logprob import response_logprob
from fastalign.models.lora import (
    adapter_off,
    add_adapter,
    base_state,
    has_adapter,
    merge_adapter,
)
from fastalign.models.lora_files import adapter_base, save_adapter
from fastalign.models.packed import PACKINGS, Packing, predict_hidden

__all__ = [
    "PACKINGS",
    "Head",
    "Packing",
    "adapter_base",
    "adapter_off",
    "add_adapter",
    "base_state",
    "check_packable",
    "find_device",
    "has_adapter",
    "lm_head",
    "load_policy",
    "merge_adapter",
    "predict_hidden",
    "response_logprob",
    "save_adapter",
    "save_model",
]
