"""Adapters saved in peft's layout: `adapter_model.safetensors` and `adapter_config.json`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from fastalign.model_files import read_object, reading
from fastalign.models.lora import ADAPTER, quiet_peft, require_peft
from fastalign.ranks.whole_weights import whole, writes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of names in peft's files


def save_adapter(model: Any, folder: str | Path) -> None:
    """Write the adapter in peft's layout; `PeftModel.from_pretrained(base, folder)` opens it.

    If ranks share the model, all of them call this, and rank 0 writes.
    """
    from peft.functional import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    state = {name: whole(value) for name, value in state.items()}
    if not writes(model):
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: value.contiguous() for name, value in state.items()}
    save_file(tensors, Path(folder) / WEIGHTS_FILE, metadata={"format": "pt"})
    replace(model.peft_config[ADAPTER], inference_mode=True).save_pretrained(str(folder))
    model.generation_config.save_pretrained(str(folder))  # it lists the tokens that end an answer


def adapter_base(path: str | Path) -> str | None:
    """Return the base that a local adapter folder names; None for any other folder.

    Raises:
        ValueError: if the adapter is not LoRA, is beside a model, or is damaged; its base does not
            exist; or peft is not installed.
    """
    folder = Path(path).expanduser()
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    require_peft(f"model.path: {folder} is an adapter, which")
    try:
        config = read_object(file)
    except ValueError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise ValueError(f"{file}: expected the configuration of an adapter: {reason}") from None
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if kind != "LORA":
        raise ValueError(f"{file}: expected a LoRA adapter (peft_type LORA), got {kind!r}")
    if config.get("modules_to_save"):
        raise ValueError(
            f"{file}: expected an adapter without modules_to_save, which replaces whole layers; "
            f"got {config['modules_to_save']}; merge it with peft (merge_and_unload) first"
        )
    if (folder / "config.json").is_file():
        raise ValueError(f"model.path: expected a model or an adapter, {folder} holds both")
    if not base or not isinstance(base, str):
        raise ValueError(f"{file}: base_model_name_or_path is empty; write the base's folder there")
    local = Path(base).expanduser()
    if not local.exists() and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        raise ValueError(
            f"{file}: its base {base} is not here; correct base_model_name_or_path, or run where "
            "that path leads to it"
        )
    return str(base)


def open_adapter(model: Any, folder: str | Path) -> None:
    """Add a saved adapter to its base, in place; its matrices are float32 whatever the base is.

    Raises:
        ValueError: if its files are damaged, or it was not made for this model.
    """
    from peft import PeftConfig
    from peft.functional import (
        cast_adapter_dtype,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )

    file = Path(folder).expanduser() / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"model.path: the adapter's folder {folder} has no {WEIGHTS_FILE}")
    what, names = f"model.path: the adapter in {folder} cannot be used", (CONFIG_FILE, WEIGHTS_FILE)
    with reading(what, folder, *names), quiet_peft():
        saved = {name.removeprefix(PREFIX): value for name, value in load_file(file).items()}
        model.add_adapter(PeftConfig.from_pretrained(str(file.parent)), ADAPTER)
    cast_adapter_dtype(model, ADAPTER)
    wanted = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    # peft also saves the base's own weight of an adapted head
    wanted |= {name: value for name, value in model.state_dict().items() if name in saved}
    for name in sorted(wanted.keys() | saved.keys()):
        shapes = [tuple(state[name].shape) if name in state else None for state in (saved, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"model.path: the adapter in {folder} was not made for its base "
                f"{model.name_or_path}: {name} is {shapes[0]} in the adapter, expected {shapes[1]}"
            )
    set_peft_model_state_dict(model, saved, adapter_name=ADAPTER)
