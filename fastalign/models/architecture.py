"""Architectures: what is read of a configuration, and what is reset before a model is used."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)


class RopeLimit(NamedTuple):
    """The range of a rotary embedding whose frequencies depend on a batch's longest sequence.

    Attributes:
        kind: transformers' `rope_type`.
        tokens: most tokens of a sequence for which the frequencies are those of the short range.
        has_long: True if all longer sequences have the same frequencies too.
    """

    kind: str
    tokens: int
    has_long: bool


def rope_limit(config: Any) -> RopeLimit | None:
    """Return the limit of a model's rotary embedding, or None if its frequencies are fixed."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    for values in [rope, *[value for value in rope.values() if isinstance(value, dict)]]:
        kind = values.get("rope_type", "")
        if kind == "longrope":
            return RopeLimit(kind, values["original_max_position_embeddings"], True)
        if "dynamic" in kind:
            return RopeLimit(kind, text.max_position_embeddings, False)
    return None


def num_positions(config: Any) -> int | None:
    """Return the most tokens of a sequence, or None if the configuration does not limit them."""
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found


def backbone(model: Any) -> Any:
    """Return the model without its head: what gives the hidden states after the final norm."""
    body = model.base_model
    if body is not model:
        return body
    # Llama 4's prefix is that of another class, or its text model is a whole causal model
    return model.model if hasattr(model, "model") else model.get_decoder().model


def auto_class(config: Any) -> Any:
    """Return transformers' class that opens causal models of a configuration, or None.

    A multimodal checkpoint is opened by the class that it was saved by, with its towers.
    """
    name = (config.architectures or [""])[0]
    kind = config.model_type
    multimodal = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if multimodal and name.endswith("ForConditionalGeneration"):
        return AutoModelForImageTextToText
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or own_code:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText if multimodal else None


def tower_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield by their names the parameters that no text goes through, such as a vision tower's."""
    if model.config.get_text_config() is model.config:
        return
    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    parts = [model.get_decoder(), *(head for head in heads if head is not None)]
    of_text = {id(parameter) for part in parts for parameter in part.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in of_text:
            yield name, parameter


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout, layer drop and jitter to 0, so that policy and reference are the same."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def is_reward_model(config: Any, path: Any = "") -> bool:
    """Return True for a reward model's configuration, False for a causal model's.

    Raises:
        ValueError: if it is a classifier of another kind, or has several labels.
    """
    (name,) = (config.architectures or [config.model_type])[:1]
    if not name.endswith("Classification"):
        return False
    if not name.endswith("ForSequenceClassification") or config.num_labels != 1:
        raise ValueError(
            f"model.path: expected a sequence classifier with num_labels 1, got {name} with "
            f"num_labels {config.num_labels}"
        )
    return True
