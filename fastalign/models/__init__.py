"""Models: loading, the packed forward, the head."""

from fastalign.models.compiled import compile_layers
from fastalign.models.head import Head, lm_head
from fastalign.models.load import check_packable, find_device, load_policy, save_model
from fastalign.models.logprob import response_logprob
from fastalign.models.offload import find_offload, offload_layers
from fastalign.models.packed import PACKINGS, Packing, predict_hidden

__all__ = [
    "PACKINGS",
    "Head",
    "Packing",
    "check_packable",
    "compile_layers",
    "find_device",
    "find_offload",
    "lm_head",
    "load_policy",
    "offload_layers",
    "predict_hidden",
    "response_logprob",
    "save_model",
]
