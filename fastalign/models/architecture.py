"""Architectures: which of them can be packed exactly, and what is reset before they are used."""

from typing import Any

from torch import nn

# Tested: packed log-probs and every gradient equal those of one sequence at a time.
PACKABLE = (
    *("llama", "qwen2", "qwen3", "mistral"),
    *("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox"),
)
# Rotary frequencies that depend on the longest sequence in the batch.
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


def packing_fault(config: Any) -> str | None:
    """Return why an architecture is not known to be exact packed; None if it is."""
    if config.model_type not in PACKABLE:
        return (
            f"model type {config.model_type!r} cannot be packed: known to be exact are "
            f"{', '.join(PACKABLE)}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *[value for value in rope.values() if isinstance(value, dict)]]:
        if parameters.get("rope_type") in BATCH_DEPENDENT_ROPE:
            return (
                f"model type {config.model_type!r} with rope_type {parameters['rope_type']!r} "
                "cannot be packed: its frequencies depend on the longest sequence of a batch"
            )
    if getattr(config, "reorder_and_upcast_attn", False):
        return f"reorder_and_upcast_attn of {config.model_type!r} cannot be packed"
    return None


def check_packable(config: Any) -> None:
    """Raise ValueError, with the remedy, unless an architecture is known to be exact packed."""
    fault = packing_fault(config)
    if fault is not None:
        raise ValueError(f"{fault}; use packing: padded (--train.packing, in eval --packing)")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, so that policy and reference are the same function."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def is_reward_model(config: Any) -> bool:
    """Return True for a reward model's configuration, False for a causal model's.

    Raises:
        ValueError: if it is neither: another architecture, or a head with several labels.
    """
    (name,) = (config.architectures or [config.model_type])[:1]
    if config.model_type not in PACKABLE:
        raise ValueError(
            f"model.path: expected a reward model or a causal model of type "
            f"{', '.join(PACKABLE)}, got {name} of type {config.model_type!r}"
        )
    if not name.endswith("Classification"):
        return False
    if not name.endswith("ForSequenceClassification") or config.num_labels != 1:
        raise ValueError(
            f"model.path: expected a sequence classifier with num_labels 1, got {name} with "
            f"num_labels {config.num_labels}"
        )
    return True
