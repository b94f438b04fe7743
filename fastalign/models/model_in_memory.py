"""A model that a caller holds in memory, read as its folder would be if it were saved.

transformers opens a copy of its tensors, by the code that opens a checkpoint: the caller's model
stays as it is, and every check of a checkpoint is made.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def config_in_memory(model: Any, name: str) -> Any:
    """Return the configuration that a model's folder would have.

    Args:
        model: what the caller handed over.
        name: name of the argument, for messages.

    Raises:
        ValueError: if it is no model of transformers, has an adapter, or its weights are not here.
    """
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"{name}: expected a model without an adapter, got one with; merge it first "
            "(merge_and_unload)"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{name}: expected a transformers model, a folder or a hub name, got "
            f"{type(model).__name__}"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{name}: expected a model in memory, but weights of it are offloaded")
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    found = type(config).from_dict(config.to_diff_dict())
    found.name_or_path = model.name_or_path or ""
    return found


def class_that_opens(
    auto: Any, model: Any, config: Any, *, name: str, trust_remote_code: bool
) -> Any:
    """Return the class by which transformers opens a model's configuration.

    Args:
        auto: class such as `AutoModelForCausalLM`.
        model: the caller's model.
        config: from `config_in_memory`.
        name: name of the argument, for messages.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: if the model is of a class of its own, whose code would not be run.
    """
    with torch.device("meta"):
        opens = type(auto.from_config(config, trust_remote_code=trust_remote_code))
    if isinstance(model, opens) and type(model) is not opens:
        raise ValueError(
            f"{name}: expected a {opens.__name__}, got a {type(model).__name__}, whose own code "
            "would not be run"
        )
    return opens


def copied(
    opens: Any, model: Any, config: Any, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return a copy of a model, and which keys were missing or unexpected, as for a checkpoint.

    Args:
        opens: class of the copy, from `class_that_opens`.
        model: the caller's model.
        config: from `config_in_memory`.
        options: those of `from_pretrained`.
    """
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        options = options | {"generation_config": model.generation_config}
    opened, keys = opens.from_pretrained(
        None, config=config, state_dict=copied_state(model), **options
    )
    opened.name_or_path = opened.config.name_or_path = config.name_or_path
    return opened, keys


def copied_state(model: Any) -> dict[str, Tensor]:
    """Return copies in host memory of the tensors that the model's folder would hold.

    A tied weight is left out if it is the tensor that it is tied to.
    """
    state, tied = model.state_dict(), model.all_tied_weights_keys
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in state.items()
        if name not in tied or value.data_ptr() != state[tied[name]].data_ptr()
    }


def ready_for_use(model: Any) -> Any:
    """Return a model as it is handed to the caller after its training: for forwards and `generate`.

    Activations are no longer recomputed.
    """
    if getattr(model, "is_gradient_checkpointing", False):
        model.gradient_checkpointing_disable()
    return model.eval()
