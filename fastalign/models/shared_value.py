"""A value model that shares the policy's layers, written as a sequence classifier."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from fastalign.model_files import reason_of
from fastalign.models.load import write_model
from fastalign.models.lora import base_state
from fastalign.models.lora_files import SCORE_WEIGHT
from fastalign.models.reward import VALUE_HEAD, set_pad_token
from fastalign.ranks.whole_weights import whole_state


def classifier_of(policy: Any) -> Any:
    """Return the sequence classifier with a causal model's layers, without weights.

    Raises:
        ValueError: if transformers has no such classifier, or its layers have other names.
    """
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
        others = model.state_dict().keys() - base_state(policy).keys() - {SCORE_WEIGHT}
        reason = f"it has no {min(others)}" if others else None
    except ValueError as error:
        reason = reason_of(error)
    if reason is not None:
        raise ValueError(
            f"value.share_policy: {type(policy).__name__} has no sequence classifier of "
            f"transformers that its value model could be written as: {reason}"
        )
    if hasattr(policy, "save_dtype"):
        model.save_dtype = policy.save_dtype
    return model


def save_shared_value(policy: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write a policy's layers under its value head as a value model, in transformers' layout.

    If ranks share the policy, all of them call this, and rank 0 writes. The tokenizer has a pad
    token that ends no response.
    """
    state = whole_state(policy)
    if state is None:
        return
    model = classifier_of(policy)
    with torch.device("meta"):
        set_pad_token(model, tokenizer.pad_token_id)
    state[SCORE_WEIGHT] = state[f"{VALUE_HEAD}.weight"]
    weights = {}
    for name, wanted in model.state_dict().items():
        missing = len(wanted) - len(state[name]) if wanted.ndim else 0  # a row for the pad token
        rows = state[name].new_zeros(missing, *wanted.shape[1:]) if missing else None
        weights[name] = state[name] if rows is None else torch.cat([state[name], rows])
    write_model(model, weights, tokenizer, folder)
