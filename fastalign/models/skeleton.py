"""A model's architecture without its weights: for tensors that have shapes and no data."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastalign.compute import Compute
from fastalign.models import attention
from fastalign.models.load import PACKABLE, check_packable, disable_dropout, read_config
from fastalign.models.lora_files import adapter_base
from fastalign.models.reward import is_reward_model


def model_without_weights(
    path: str | Path,
    compute: Compute,
    *,
    reward: bool,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Any:
    """Build the model that `load_policy` or `load_reward_model` would load, freshly initialised.

    Call it where tensors have no data (meta or fake); the arguments are those of `load_policy`,
    and `reward` selects `load_reward_model`.

    Raises:
        ValueError: if there is no model, or those functions would refuse it.
    """
    attention.register()
    base = None if reward else adapter_base(path)  # a reward model is no adapter
    config = read_config(base or path, trust_remote_code=trust_remote_code)
    if compute.packing != "padded":
        check_packable(config)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if config.model_type in PACKABLE:
        options["attn_implementation"] = attention.implementation_for(config, compute, dtype)
    if reward:
        is_reward_model(config)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, **options)
        model.get_input_embeddings().padding_idx = None  # as `load_reward_model` has it
    else:
        model = AutoModelForCausalLM.from_config(config, **options)
    disable_dropout(model)
    return model.eval()
