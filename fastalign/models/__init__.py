"""Models: loading, the packed forward, the head."""

from fastalign.models.attention import (
    ATTENTIONS,
    AttentionChoice,
    attention_of,
    attention_reason,
)
from fastalign.models.head import Head, lm_head
from fastalign.models.load import check_packable, find_device, load_policy, save_model
from fastalign.models.logprob import response_logprob
from fastalign.models.packed import PACKINGS, Packing, predict_hidden

__all__ = [
    "ATTENTIONS",
    "PACKINGS",
    "AttentionChoice",
    "Head",
    "Packing",
    "attention_of",
    "attention_reason",
    "check_packable",
    "find_device",
    "lm_head",
    "load_policy",
    "predict_hidden",
    "response_logprob",
    "save_model",
]
