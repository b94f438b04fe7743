"""A small copy of a model's configuration: every kind of layer once, few numbers in each.

Settings that are sizes become small, by name; all others, such as a softcap, a scale, or the kind
of position, stay. What the copy computes shows what the whole model's layers do.
"""

from collections.abc import Mapping
from typing import Any

WIDTH = 32
WINDOW = 5  # of a sliding window or a chunk
POSITIONS = 64
FEW_POSITIONS = 16  # where a kind of rope begins to extend its range
HEADS, HEAD_SIZE, LOW_RANK = 4, 8, 16


def named(size: int, *names: str) -> dict[str, int]:
    """Return a size by each of its names, which may be given several to a text."""
    return dict.fromkeys((name for text in names for name in text.split()), size)


# Sizes of the small copy, whatever they were, unless 0.
SMALL: dict[str, int] = {
    **named(
        WIDTH,
        "hidden_size n_embd d_model word_embed_proj_dim embedding_size embedding_dim lru_width",
        "intermediate_size n_inner ffn_dim ffn_hidden_size d_ff dff dim_ff decoder_ffn_dim",
        "encoder_ffn_dim inner_dim block_ff_dim mlp_hidden_size intermediate_size_mlp",
        "moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size expert_ffn_hidden_size dense_intermediate_size",
        "hidden_size_per_layer_input",
    ),
    **named(2 * WIDTH, "attention_hidden_size"),
    **named(
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads",
        "encoder_attention_heads linear_num_key_heads linear_num_value_heads",
    ),
    **named(
        HEAD_SIZE,
        "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim global_head_dim index_head_dim",
        "swa_head_dim swa_v_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head",
        "mamba_headdim mamba_head_dim kv_channels query_pre_attn_scalar",
    ),
    **named(2 * HEAD_SIZE, "qk_head_dim attention_head_dim"),
    **named(LOW_RANK, "q_lora_rank kv_lora_rank o_lora_rank"),
    **named(64, "vocab_size vocab_size_per_layer_input max_vocab_size"),
    **named(
        POSITIONS,
        "max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length max_seq_length",
    ),
    **named(FEW_POSITIONS, "original_max_position_embeddings"),
    **named(
        WINDOW,
        "sliding_window sliding_window_size attention_chunk_size attention_window_size",
        "window_size local_attention index_topk",
    ),
    **named(2, "index_block_size index_topk_blocks"),
    **named(1, "bos_token_id decoder_start_token_id"),
    **named(2, "eos_token_id"),
    **named(0, "pad_token_id padding_idx"),
}
# Sizes that stay where they are less.
AT_MOST: dict[str, int] = {
    **named(16, "index_n_heads"),  # with few, keys have the same score of 0
    **named(
        4,
        "num_experts num_local_experts n_routed_experts moe_num_experts num_attention_experts",
        "n_experts moe_num_primary_experts rotary_dim mamba_d_state ssm_state_size state_size",
    ),
    **named(
        2,
        "num_experts_per_tok num_experts_per_token top_k_experts moe_topk moe_top_k moe_k top_k",
        "num_shared_experts n_shared_experts zero_expert_num num_zero_experts altup_num_inputs",
        "laurel_rank mamba_dt_rank",
    ),
    **named(
        1,
        "mamba_n_groups mamba_ngroups n_groups n_group topk_group first_k_dense_replace",
        "num_dense_layers max_window_layers depth num_soft_tokens",
    ),
}
MAMBA_HEADS = ("num_heads", "mamba_n_heads", "mamba_num_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "swa_num_key_value_heads")
LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"),
)
# Every how many layers a kind of layer comes.
PERIODS = ("_period", "_interval", "_frequency", "_freq", "_pattern")


def small_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a small copy of a configuration, given as a dictionary."""
    num_layers = next((int(values[n]) for n in LAYERS if isinstance(values.get(n), int)), 0)
    places = {
        name: None if name.endswith("_id") else marked(value, num_layers)
        for name, value in values.items()
    }
    layers = kept_layers(values | {n: marks for n, marks in places.items() if marks}, num_layers)
    heads = next((values[n] for n in ("num_attention_heads", "n_head") if n in values), None)
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name.endswith("_config") and name != "per_layer_config":
            found[name] = small_values(value)  # without what its own class may not take
            for extra in ("_name_or_path", "output_attentions"):
                found[name].pop(extra, None)
        elif isinstance(value, dict) and "rope" in name:
            found[name] = small_rope(value)
        elif name == "per_layer_config" and value:
            by_layer = {int(layer): part for layer, part in value.items()}
            found[name] = {
                str(place): small_values(by_layer[layer])
                for place, layer in enumerate(layers)
                if layer in by_layer
            }
        elif (marks := places[name]) is not None:
            found[name] = [place for place, layer in enumerate(layers) if marks[layer]]
        elif isinstance(value, list) and len(value) == num_layers > 0:
            found[name] = [small_value(name, value[layer], heads) for layer in layers]
        elif name in LAYERS and isinstance(value, int):
            found[name] = len(layers)
        elif name == "num_kv_shared_layers" and value:
            found[name] = sum(layer >= num_layers - value for layer in layers)
        elif name == "output_router_logits":
            found[name] = False  # the router's loss is no part of a forward
        elif name.endswith("_offset") and isinstance(value, int):
            found[name] = min(value, 1)
        else:
            found[name] = small_value(name, value, heads)
    inner = int((values.get("expand") or values.get("mamba_expand") or 0) * WIDTH)
    for name in MAMBA_HEADS if inner else ():  # of state-space layers
        if name in values:
            found[name] = inner // HEAD_SIZE
    if values.get("mamba_d_ssm"):
        found["mamba_d_ssm"] = inner
    return found


def marked(value: Any, num_layers: int) -> list[bool] | None:
    """Return for each layer whether a list of layers' numbers holds it; None: no such list."""
    if not isinstance(value, list) or not value or not all(type(each) is int for each in value):
        return None
    if value != sorted(set(value)) or not 0 <= value[0] <= value[-1] < num_layers:
        return None
    return [layer in value for layer in range(num_layers)]


def small_value(name: str, value: Any, heads: Any) -> Any:
    """Return a setting's value in the small copy."""
    if name == "eos_token_id" and isinstance(value, list):
        return [SMALL[name]]
    if name in ("partial_rotary_factor", "rotary_pct") and value:
        return max(0.25, round(4 * value) / 4)  # an even part of a small head
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if name in KEY_HEADS:
        return 1 if value == 1 else HEADS if value == heads else HEADS // 2
    if name in SMALL:
        return SMALL[name] if value or name.endswith("_id") else value
    if name in AT_MOST or name.endswith(PERIODS):
        return min(value, AT_MOST.get(name, 2))
    return min(value, 1) if name.endswith("_token_id") else value


def kept_layers(values: Mapping[str, Any], num_layers: int) -> list[int]:
    """Return the layers of the small copy: the first of each kind, and two at least.

    Where later layers may share weights or keys of earlier ones, the last of each kind too.
    """
    lists = [v for v in values.values() if isinstance(v, list) and len(v) == num_layers]
    kinds = [repr([each[layer] for each in lists]) for layer in range(num_layers)]
    first = {kinds.index(kind) for kind in kinds}
    if values.get("num_kv_shared_layers") or values.get("layers_block_type"):
        first |= {num_layers - 1 - kinds[::-1].index(kind) for kind in kinds}
    return sorted(first | set(range(min(2, num_layers))))


def small_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a small copy's rotary embedding."""
    part = small_value("partial_rotary_factor", values.get("partial_rotary_factor", 1), None)
    num = int(HEAD_SIZE * part) // 2
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found[name] = small_rope(value)
        elif name.endswith("_factor") and isinstance(value, list):
            found[name] = [value[len(value) * place // num] for place in range(num)]
        elif name == "mrope_section":
            found[name] = [num - num // 2, (num // 2 + 1) // 2, num // 2 // 2]
        else:
            found[name] = small_value(name, value, None)
    return found
