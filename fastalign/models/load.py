"""Loads and saves causal models; refuses by name those that cannot be packed exactly."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastalign.compute import ON_CPU, Compute
from fastalign.models import attention
from fastalign.models.head import check_head
from fastalign.models.lora import merge_adapter
from fastalign.models.lora_files import CONFIG_FILE, adapter_base, open_adapter
from fastalign.models.low_bit import keep_differentiable, nf4_options
from fastalign.ranks.whole_weights import whole_state

# Tested: packed log-probs and every gradient equal those of one sequence at a time.
PACKABLE = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
)
# Rotary frequencies that depend on the longest sequence in the batch.
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
CPU_ALLOCATOR = "DefaultCPUAllocator"


def check_packable(config: Any) -> None:
    """Refuses an architecture that is not known to be exact when packed.

    Raises:
        ValueError: names the architecture and the way out.
    """
    way_out = "use packing: padded (--train.packing padded)"
    if config.model_type not in PACKABLE:
        raise ValueError(
            f"model type {config.model_type!r} cannot be packed: known to be exact are "
            f"{', '.join(PACKABLE)}; {way_out}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *[value for value in rope.values() if isinstance(value, dict)]]:
        if parameters.get("rope_type") in BATCH_DEPENDENT_ROPE:
            raise ValueError(
                f"model type {config.model_type!r} with rope_type {parameters['rope_type']!r} "
                "cannot be packed: its frequencies depend on the longest sequence of a batch; "
                f"{way_out}"
            )
    if getattr(config, "reorder_and_upcast_attn", False):
        raise ValueError(
            f"reorder_and_upcast_attn of {config.model_type!r} cannot be packed; {way_out}"
        )


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout to 0: policy and reference must be the same function."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def read_config(path: str | Path, *, trust_remote_code: bool) -> Any:
    """The configuration of a model.

    Raises:
        ValueError: there is no model at `path`, or an adapter alone.
    """
    if (Path(path).expanduser() / CONFIG_FILE).is_file():
        raise ValueError(
            f"model.path: expected a model, {path} is an adapter; merge it first (fastalign merge)"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.path: no model can be loaded from {str(path)!r}: {first}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; PyTorch's on a CPU raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)


def unreadable_weights(path: str | Path, error: Exception) -> ValueError:
    """The one line about weights that are missing or damaged."""
    if isinstance(error, UnpicklingError):  # torch's text says how to run it all the same
        first = "a file is a pickle of more than tensors, which is not run"
    else:
        first = str(error).strip().splitlines()[0]
    return ValueError(f"model.path: the weights in {str(path)!r} cannot be read: {first}")


def check_finite(model: nn.Module, path: str | Path) -> None:
    """Refuses a model with a weight that is not a number: every loss of it would be none.

    Raises:
        ValueError: naming the first such weight.
    """
    for name, value in model.named_parameters():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(
                f"model.path: the weights in {str(path)!r} are damaged: {name} holds a value that "
                "is not finite"
            )


def load_policy(
    path: str | Path,
    compute: Compute = ON_CPU,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    nf4: bool = False,
) -> Any:
    """Load a causal model from a folder in transformers' layout, or from the hub.

    Args:
        path: folder or hub name; of a folder in peft's layout, the base with the adapter merged.
        compute: how the model will be run: its device; its packing, of which any but `padded`
            requires an architecture known to be exact; and its attention.
        dtype: dtype of the parameters.
        trust_remote_code: run code that comes with the model.
        nf4: quantise the weights of every linear layer but the head; such a model is frozen.

    Raises:
        ValueError: if there is no model, or a classifier; the architecture cannot be packed, or its
            head is unknown; a weight is missing or not finite; an adapter does not fit its base;
            peft or bitsandbytes is needed and not installed.
    """
    attention.register()
    base = adapter_base(path)
    source = path if base is None else base
    config = read_config(source, trust_remote_code=trust_remote_code)
    kind = (config.architectures or [""])[0]
    if kind.endswith("Classification"):
        raise ValueError(
            f"model.path: expected a causal model, got {kind} in {str(source)!r}; a reward model's "
            "language-model head is gone"
        )
    options = nf4_options(dtype, compute.device) if nf4 else {}
    if compute.packing != "padded":
        check_packable(config)
    if config.model_type in PACKABLE:
        options["attn_implementation"] = attention.implementation_for(config, compute, dtype)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, UnpicklingError) as error:
        raise unreadable_weights(source, error) from error
    if found["missing_keys"]:  # transformers would draw them at random
        raise ValueError(
            f"model.path: the weights in {str(source)!r} are not all there: no "
            f"{min(found['missing_keys'])}"
        )
    if nf4:
        keep_differentiable(model)
    if base is not None:
        open_adapter(model, path)
        merge_adapter(model)
    model = model.to(compute.device)
    check_finite(model, path)
    disable_dropout(model)
    model.eval()
    check_head(model)
    return model


def save_model(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Writes weights, configuration and tokenizer in transformers' layout.

    Of a model that ranks share, all call this, and rank 0 writes.
    """
    state = None if model is None else whole_state(model)
    if state is not None:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
