"""Models: loading, the packed forward, the heads."""

from fastalign.compute import PACKINGS, AttentionChoice, Packing, find_device
from fastalign.models.attention import ATTENTIONS, AttentionPlan, attention_of, attention_reason
from fastalign.models.compiled import compile_layers
from fastalign.models.head import lm_head
from fastalign.models.load import (
    check_packable,
    is_out_of_memory,
    load_policy,
    read_config,
    save_model,
)
from fastalign.models.logprobs import response_logprob
from fastalign.models.lora import (
    adapter_off,
    adapter_rank,
    add_adapter,
    base_state,
    dense_state,
    has_adapter,
    linear_names,
    merge_adapter,
)
from fastalign.models.lora_files import adapter_base, save_adapter
from fastalign.models.offload import find_offload, offload_layers
from fastalign.models.packed import hidden_at, predict_hidden
from fastalign.models.reward import (
    is_reward_model,
    load_reward_model,
    response_reward,
    save_reward_model,
    score_at,
    set_pad_token,
)
from fastalign.models.reward_scale import RewardScale, reward_scale, set_reward_scale
from fastalign.models.skeleton import model_without_weights
from fastalign.ranks.parallel import (
    Strategy,
    enter,
    is_sharded,
    load_on_first,
    part_from_ranks,
    share_by_ddp,
    share_by_fsdp,
)
from fastalign.ranks.whole_weights import whole, whole_state, with_whole_weights

__all__ = [
    "ATTENTIONS",
    "PACKINGS",
    "AttentionChoice",
    "AttentionPlan",
    "Packing",
    "RewardScale",
    "Strategy",
    "adapter_base",
    "adapter_off",
    "adapter_rank",
    "add_adapter",
    "attention_of",
    "attention_reason",
    "base_state",
    "check_packable",
    "compile_layers",
    "dense_state",
    "enter",
    "find_device",
    "find_offload",
    "has_adapter",
    "hidden_at",
    "is_out_of_memory",
    "is_reward_model",
    "is_sharded",
    "linear_names",
    "lm_head",
    "load_on_first",
    "load_policy",
    "load_reward_model",
    "merge_adapter",
    "model_without_weights",
    "offload_layers",
    "part_from_ranks",
    "predict_hidden",
    "read_config",
    "response_logprob",
    "response_reward",
    "reward_scale",
    "save_adapter",
    "save_model",
    "save_reward_model",
    "score_at",
    "set_pad_token",
    "set_reward_scale",
    "share_by_ddp",
    "share_by_fsdp",
    "whole",
    "whole_state",
    "with_whole_weights",
]
