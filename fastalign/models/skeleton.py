"""A model's architecture without its weights: for tensors that have shapes and no data."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastalign.compute import Packing
from fastalign.models import attention
from fastalign.models.load import PACKABLE, check_packable, disable_dropout, read_config
from fastalign.models.lora_files import adapter_base
from fastalign.models.reward import is_reward_model


def model_without_weights(
    path: str | Path,
    *,
    reward: bool,
    dtype: torch.dtype,
    device: torch.device,
    packing: Packing = "shared_prefix",
    attention_name: attention.AttentionChoice = "auto",
    compute_dtype: torch.dtype | None = None,
    trust_remote_code: bool,
) -> Any:
    """What `load_policy` or `load_reward_model` would load, freshly initialised.

    To be called where tensors have no data, fake or meta; arguments as those of `load_policy`.

    Raises:
        ValueError: no model there, or one that they refuse.
    """
    attention.register()
    base = None if reward else adapter_base(path)  # a reward model is no adapter
    config = read_config(base or path, trust_remote_code=trust_remote_code)
    if packing != "padded":
        check_packable(config)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if config.model_type in PACKABLE:
        chosen = attention.choose_attention(attention_name, device, compute_dtype or dtype, config)
        options["attn_implementation"] = attention.registered_name(chosen)
    if reward:
        is_reward_model(config)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, **options)
        model.get_input_embeddings().padding_idx = None  # as `load_reward_model` has it
    else:
        model = AutoModelForCausalLM.from_config(config, **options)
    disable_dropout(model)
    return model.eval()
