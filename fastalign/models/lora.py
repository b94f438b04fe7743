"""Low-rank adapters on a frozen causal model, through peft: the one file that imports it.

A model with an adapter stays a transformers causal model; its linear layers are peft's.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastalign.models.low_bit import dense_layer, is_quantised
from fastalign.ops import LoraWeights

ADAPTER = "default"  # peft's own name for the only adapter
CONFIG_FILE = "adapter_config.json"
ALL_LINEAR = "all-linear"


def require_peft(what: str) -> None:
    """Refuses to go on without peft.

    Raises:
        ValueError: it is not installed; `what` needs it.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ValueError(f"{what} needs peft: pip install 'fastalign[lora]'") from None


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without peft's warnings of what is taken care of.

    They are of transposed layers, whose orientation it finds out itself, and of tied heads, which
    are untied here before anything is merged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def linear_names(model: Any) -> dict[str, nn.Module]:
    """Every layer that an adapter may go on, by its full name; the head is the last one."""
    kinds = (nn.Linear, Conv1D)
    return {name: part for name, part in model.named_modules() if isinstance(part, kinds)}


def target_endings(model: Any, targets: Sequence[str]) -> list[str]:
    """The endings that peft looks for, `all-linear` spelled out.

    Raises:
        ValueError: a target that no linear layer's name ends in; says what there is.
    """
    head = model.get_output_embeddings()
    layers = linear_names(model)
    names = {name.rpartition(".")[2]: part is head for name, part in layers.items()}
    found: dict[str, None] = {}
    for target in targets:
        if target == ALL_LINEAR:
            found |= dict.fromkeys(name for name, is_head in names.items() if not is_head)
        elif any(name == target or name.endswith(f".{target}") for name in layers):
            found[target] = None
        else:
            raise ValueError(
                f"model.lora.targets: no linear layer's name ends in {target!r}; expected "
                f"{ALL_LINEAR} or among {', '.join(names)}"
            )
    return list(found)


def add_adapter(
    model: Any, *, rank: int, alpha: float, targets: Sequence[str], use_rslora: bool = False
) -> None:
    """Freezes the model and puts a float32 adapter on it whose B is 0 (arXiv 2106.09685).

    Args:
        model: a causal model from `load_policy`; changed in place.
        rank: r of the matrices A (r, D) and B (V, r).
        alpha: the adapter's product is scaled by alpha / r.
        targets: `all-linear` (every linear layer but the head), or endings of layers' names.
        use_rslora: scale by alpha / sqrt(r) (arXiv 2312.03732).

    Raises:
        ValueError: a target that the model has not, or peft is not installed.
    """
    require_peft("model.lora.rank")
    from peft import LoraConfig
    from peft.functional import cast_adapter_dtype

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=target_endings(model, targets),
        use_rslora=use_rslora,
        task_type="CAUSAL_LM",
    )
    model.requires_grad_(False)
    with quiet_peft():
        model.add_adapter(config, ADAPTER)
    cast_adapter_dtype(model, ADAPTER)


def has_adapter(model: Any) -> bool:
    """Whether an adapter is on the model."""
    return bool(getattr(model, "peft_config", None))


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The model as if it had no adapter: its frozen base; nothing to do where it has none."""
    if not has_adapter(model):
        yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def layer_adapter(layer: Any) -> LoraWeights | None:
    """The adapter on a linear layer, or None: there is none, or it is off."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters:
        return None
    return LoraWeights(
        layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]
    )


def base_state(model: Any) -> Mapping[str, Tensor]:
    """The state of the model without its adapter, under the names that it had before."""
    state: dict[str, Tensor] = model.state_dict()
    if not has_adapter(model):
        return state
    return {
        name.replace(".base_layer.", "."): value
        for name, value in state.items()
        if ".lora_A." not in name and ".lora_B." not in name
    }


def save_adapter(model: Any, folder: str | Path) -> None:
    """Writes the adapter in peft's layout; `PeftModel.from_pretrained(base, folder)` opens it."""
    from peft.functional import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}": value.contiguous() for name, value in state.items()}
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    replace(model.peft_config[ADAPTER], inference_mode=True).save_pretrained(str(folder))
    model.generation_config.save_pretrained(str(folder))  # it lists the tokens that end an answer


def adapter_base(path: str | Path) -> str | None:
    """The base that a local adapter folder names; None: it is no adapter folder.

    Raises:
        ValueError: the adapter is damaged or not LoRA, its base is not there, or peft is missing.
    """
    folder = Path(path).expanduser()
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    require_peft(f"model.path: {folder} is an adapter, which")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, base = config["peft_type"], config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected the configuration of an adapter: {error}") from None
    if kind != "LORA" or config.get("modules_to_save"):
        raise ValueError(f"{file}: expected a LoRA adapter without modules_to_save, got {kind}")
    if (folder / "config.json").is_file():  # the base's files are in the same folder
        return str(folder)
    if not base:
        raise ValueError(f"{file}: base_model_name_or_path is empty; write the base's folder there")
    local = Path(base).expanduser()
    if not local.exists() and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        raise ValueError(
            f"{file}: its base {base} is not here; correct base_model_name_or_path, or run where "
            "that path leads to it"
        )
    return str(base)


def untie_head(model: Any) -> None:
    """Gives the head a weight of its own if it is the embedding's: the two will differ."""
    head = model.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


@torch.no_grad()
def merge_adapter(model: Any) -> None:
    """Adds the adapter's product to each weight, in place; leaves an ordinary causal model.

    A weight keeps its dtype, and the sum is rounded to it, by peft's own merge. Quantised layers
    become dense ones in the dtype of the other weights: quantising them again would lose more of
    a small change than it keeps.
    """
    from peft.tuners.lora import LoraLayer

    if layer_adapter(model.get_output_embeddings()) is not None:
        untie_head(model)
    layers = {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    for name, layer in layers.items():
        base: nn.Module = layer.get_base_layer()
        if is_quantised(base):
            base = dense_layer(base, model.dtype, layer.get_delta_weight(ADAPTER))
        else:
            layer.merge(adapter_names=[ADAPTER])
        model.set_submodule(name, base)
    for name, part in list(model.named_modules()):
        if is_quantised(part):
            model.set_submodule(name, dense_layer(part, model.dtype))
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    del model.peft_config
    model._hf_peft_config_loaded = False  # what transformers' save_pretrained looks at
