"""Models: loading and saving, the forward of a packed batch, adapters, and reward models."""

from fastalign.models.architecture import check_packable, disable_dropout, is_reward_model
from fastalign.models.attention import ATTENTIONS, AttentionPlan, attention_name, attention_reason
from fastalign.models.forward import (
    hidden_and_head,
    hidden_at,
    response_logprob,
    response_values,
    sequence_logprobs,
)
from fastalign.models.head import lm_head
from fastalign.models.layers import compile_layers, find_offload, offload_layers
from fastalign.models.load import (
    fingerprint_or_none,
    load_policy,
    load_reward_model,
    model_fingerprint,
    model_without_weights,
    read_config,
    save_model,
    save_reward_model,
    set_save_dtype,
    weights_fingerprint,
)
from fastalign.models.lora import (
    adapter_off,
    adapter_rank,
    add_adapter,
    dense_state,
    has_adapter,
    linear_names,
    merge_adapter,
)
from fastalign.models.lora_files import adapter_base, save_adapter
from fastalign.models.reward import (
    RewardScale,
    response_reward,
    reward_scale,
    score_at,
    set_pad_token,
    set_reward_scale,
)

__all__ = [
    "ATTENTIONS",
    "AttentionPlan",
    "RewardScale",
    "adapter_base",
    "adapter_off",
    "adapter_rank",
    "add_adapter",
    "attention_name",
    "attention_reason",
    "check_packable",
    "compile_layers",
    "dense_state",
    "disable_dropout",
    "find_offload",
    "fingerprint_or_none",
    "has_adapter",
    "hidden_and_head",
    "hidden_at",
    "is_reward_model",
    "linear_names",
    "lm_head",
    "load_policy",
    "load_reward_model",
    "merge_adapter",
    "model_fingerprint",
    "model_without_weights",
    "offload_layers",
    "read_config",
    "response_logprob",
    "response_reward",
    "response_values",
    "reward_scale",
    "save_adapter",
    "save_model",
    "save_reward_model",
    "score_at",
    "sequence_logprobs",
    "set_pad_token",
    "set_reward_scale",
    "set_save_dtype",
    "weights_fingerprint",
]
