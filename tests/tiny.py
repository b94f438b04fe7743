"""Tiny random models, one for each family that is promised to pack exactly."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from fastalign.models import attention
from fastalign.models.exactness import Verdict
from fastalign.models.load import as_used
from fastalign.models.lora import add_adapter

AS_PACKED = Verdict(
    "", "", 0.0, 0.0, 2, 2, (), skips=True, decodes=True, generates=True, left_padding=True
)
SHARED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
}
GROUPED = {**SHARED, "num_key_value_heads": 2, "head_dim": 8}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": {**GROUPED, "initializer_range": 0.4},
    "qwen3": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 5},
    "gemma": GROUPED,
    "gemma2": {
        **GROUPED,
        "sliding_window": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {
        **GROUPED,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.4,
    },
    "gpt_neox": SHARED,
    "gpt_oss": {  # sinks, and a mixture of experts
        **GROUPED,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
    },
    "deepseek_v3": {  # keys are wider than values
        **SHARED,
        **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 6},
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "first_k_dense_replace": 2},
    },
}


def tiny_model(
    architecture: str,
    *,
    vocab_size: int = 97,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    kind: Any = AutoModelForCausalLM,
) -> Any:
    """A random model of about 20,000 parameters, attention registered, dropout off."""
    attention.register()
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[architecture](
        vocab_size=vocab_size,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        num_labels=1,
        **SETTINGS[architecture],
    )
    model = kind.from_config(
        config,
        attn_implementation=attention.registered_name("sdpa"),
        experts_implementation="eager",  # the grouped products have no float64
        dtype=dtype,
    )
    for parameter in model.parameters():  # norms and biases too, so that every gradient matters
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    # GPT-OSS's MLP returns its router's choice too
    return as_used(model, replace(AS_PACKED, skips=architecture != "gpt_oss"))


def exchanged_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that compute by a kernel in place of their own code."""
    return [m for m in model.modules() if type(m).__mro__[1].__name__ == type(m).__name__]


def with_own_layers(model: nn.Module) -> Any:
    """The same model, in place, with every layer's own code."""
    for module in exchanged_layers(model):
        module.__class__ = type(module).__mro__[1]
    return model


def tiny_reward_model(architecture: str, **options: Any) -> Any:
    """The same with a score in place of the language-model head."""
    return tiny_model(architecture, kind=AutoModelForSequenceClassification, **options)


def put_adapter(model: Any, *targets: str, rank: int = 3, seed: int = 5) -> Any:
    """The model with an adapter that changes it: B is not 0."""
    torch.manual_seed(seed)
    add_adapter(model, rank=rank, alpha=2.0 * rank, targets=targets or ("all-linear",))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    return model
