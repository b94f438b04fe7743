"""Adapters saved in peft's layout: `adapter_model.safetensors` and `adapter_config.json`.

That of a reward model also holds its head, as peft saves a sequence classifier's. What a whole
reward model's `config.json` says of its scores is in `reward_config.json` beside it, and the format
of the base that it was trained on in `base_format.json`.
"""

import json
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastalign.model_files import read_object, reading
from fastalign.models.lora import (
    ADAPTER,
    REWARD_TASK,
    add_second_adapter,
    quiet_peft,
    require_peft,
    reward_head,
    train_reward_head,
)
from fastalign.models.low_bit import is_quantised
from fastalign.models.reward import AdapterModel, set_pad_token
from fastalign.ranks.whole_weights import whole, writes
from fastalign.written_files import ADAPTER_CONFIG

WEIGHTS_FILE = "adapter_model.safetensors"
REWARD_FILE = "reward_config.json"
PREFIX = "base_model.model."  # of names in peft's files
SCORE_WEIGHT = "score.weight"
# What peft's adapters of sequence classifiers save whole: the head, by its possible names.
SAVED_HEADS = {"score", "classifier"}
# Entries of a reward model's configuration that its base's has not.
OF_REWARDS = ("pad_token_id", "reward_mean", "reward_std", "tie_model", "tie_nu")
# {"format": "nf4"}, or a dtype: the base that the adapter was trained on, where its numbers hold.
BASE_FILE = "base_format.json"


def save_adapter(
    model: Any, folder: str | Path, *, head: Any = None, pad_token_id: int | None = None
) -> None:
    """Write the adapter in peft's layout; `PeftModel.from_pretrained(base, folder)` opens it.

    A reward model's has its head, and the entries of its configuration that its base's lacks. If
    ranks share the model, all of them call this, and rank 0 writes.

    Args:
        model: a model with an adapter, or an `AdapterModel`.
        folder: where the files are written.
        head: a head (1, D) on a causal model, with which the adapter is a sequence classifier's.
        pad_token_id: pad token of that classifier.
    """
    from peft.functional import get_peft_model_state_dict

    owner, name = (model.owner, model.name) if isinstance(model, AdapterModel) else (model, ADAPTER)
    head = reward_head(model) if head is None else head
    state = get_peft_model_state_dict(owner, adapter_name=name, save_embedding_layers=False)
    if head is not None:
        state = {**state, SCORE_WEIGHT: head.weight.detach()}
    state = {name: whole(value) for name, value in state.items()}
    if not writes(model):
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: value.contiguous() for name, value in state.items()}
    save_file(tensors, Path(folder) / WEIGHTS_FILE, metadata={"format": "pt"})
    config = replace(owner.peft_config[name], inference_mode=True)
    if head is None:
        model.generation_config.save_pretrained(str(folder))  # it lists the tokens that end answers
    else:
        config = replace(config, task_type=REWARD_TASK, modules_to_save=["score"])
        entries = {entry: getattr(model.config, entry, None) for entry in OF_REWARDS}
        if pad_token_id is not None:
            entries["pad_token_id"] = pad_token_id
        values = {entry: value for entry, value in entries.items() if value is not None}
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (Path(folder) / REWARD_FILE).write_text(text, encoding="utf-8")
    config.save_pretrained(str(folder))
    quantised = any(is_quantised(part) for part in owner.modules())
    dtype = owner.get_input_embeddings().weight.dtype
    base = "nf4" if quantised else str(dtype).removeprefix("torch.")
    text = json.dumps({"format": base}) + "\n"
    (Path(folder) / BASE_FILE).write_text(text, encoding="utf-8")


def format_of_base(folder: str | Path) -> str | None:
    """Return the format of the base that an adapter was trained on: `nf4` or a dtype.

    Of an adapter that another program wrote it is None.
    """
    file = Path(folder).expanduser() / BASE_FILE
    return str(read_object(file).get("format")) if file.is_file() else None


def print_other_format(folder: str | Path, base: str) -> None:
    """Print that an adapter was trained on nf4 and `model.lora.base` is not, or the reverse."""
    trained = format_of_base(folder)
    if trained is not None and (trained == "nf4") != (base == "nf4"):
        print(
            f"{folder} was trained on a base in {trained}, and model.lora.base is {base}: its "
            "numbers differ from those of its training"
        )


def take_reward_entries(model: Any, folder: str | Path) -> None:
    """Give a reward model on its base the entries that `save_adapter` wrote.

    The embedding gets a row for a pad token that the base does not have. An adapter that another
    program wrote has no such file: its scores stay raw.

    Raises:
        ValueError: if the pad token is no token id.
    """
    file = Path(folder).expanduser() / REWARD_FILE
    found = read_object(file) if file.is_file() else {}
    pad = found.get("pad_token_id")
    if pad is not None:
        num_rows = model.get_input_embeddings().weight.shape[0]
        if type(pad) is not int or not 0 <= pad <= num_rows:
            raise ValueError(
                f"{file}: expected a token id as pad_token_id, at most one beyond the base's "
                f"{num_rows} tokens, got {pad!r}"
            )
        set_pad_token(model, pad)
    for name in OF_REWARDS[1:]:
        if name in found:
            setattr(model.config, name, found[name])


def open_reward_adapter(owner: Any, folder: str | Path, name: str) -> AdapterModel:
    """Open the adapter of a reward model on the base of a causal model that has one itself.

    Raises:
        ValueError: if its files are damaged, or it was not made for this base.
    """
    config, saved = _read_adapter(folder)
    with _opening(folder):
        add_second_adapter(owner, config, name)
    model = AdapterModel(owner, name)
    _fill(owner, folder, name, saved, model.score)
    take_reward_entries(model, folder)
    return model.requires_grad_(False)


def adapter_base(path: str | Path) -> str | None:
    """Return the base that a local adapter folder names; None for any other folder.

    Raises:
        ValueError: if the adapter is not LoRA, is beside a model, or is damaged; its base does not
            exist; or peft is not installed.
    """
    folder = Path(path).expanduser()
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    require_peft(f"model.path: {folder} is an adapter, which")
    config = adapter_config(file)
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if kind != "LORA":
        raise ValueError(f"{file}: expected a LoRA adapter (peft_type LORA), got {kind!r}")
    saved = config.get("modules_to_save") or []
    if set(saved) - (SAVED_HEADS if config.get("task_type") == REWARD_TASK else set()):
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


def check_no_adapter(name: str, path: str) -> None:
    """Raise ValueError if the model that is to get an adapter already is one."""
    if adapter_base(path) is not None:
        raise ValueError(
            f"{name}: {path} is an adapter, on which peft puts no other; merge it first "
            "(fastalign merge), and train on the result"
        )


def adapter_config(file: Path) -> dict[str, Any]:
    """Read the configuration of an adapter; raise ValueError if it is damaged."""
    try:
        return read_object(file)
    except ValueError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise ValueError(f"{file}: expected the configuration of an adapter: {reason}") from None


def is_reward_adapter(path: str | Path) -> bool:
    """Return True for the folder of a reward model's adapter, False for any other folder."""
    file = Path(path).expanduser() / ADAPTER_CONFIG
    return file.is_file() and adapter_config(file).get("task_type") == REWARD_TASK


def open_adapter(model: Any, folder: str | Path) -> None:
    """Add a saved adapter to its base, in place; its matrices are float32 whatever the base is.

    That of a reward model brings its head. A base without weights gets none of the adapter's.

    Raises:
        ValueError: if its files are damaged, or it was not made for this model.
    """
    from peft.functional import cast_adapter_dtype

    config, saved = _read_adapter(folder)
    with _opening(folder), quiet_peft():
        model.add_adapter(config, ADAPTER)
    cast_adapter_dtype(model, ADAPTER)
    train_reward_head(model)
    if not any(parameter.is_meta for parameter in model.parameters()):
        _fill(model, folder, ADAPTER, saved, reward_head(model))


def _opening(folder: str | Path) -> AbstractContextManager[None]:
    """Turn what peft raises for an adapter's files into a ValueError of one line."""
    what = f"model.path: the adapter in {folder} cannot be used"
    return reading(what, folder, ADAPTER_CONFIG, WEIGHTS_FILE)


def _read_adapter(folder: str | Path) -> tuple[Any, dict[str, Tensor]]:
    """Read peft's configuration of a saved adapter, and its tensors by their names in the model."""
    from peft import PeftConfig

    file = Path(folder).expanduser() / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"model.path: the adapter's folder {folder} has no {WEIGHTS_FILE}")
    with _opening(folder), quiet_peft():
        saved = {name.removeprefix(PREFIX): value for name, value in load_file(file).items()}
        config = PeftConfig.from_pretrained(str(file.parent))
    config.modules_to_save = None  # the head of a reward model is no layer of peft here
    config.inference_mode = False
    return config, saved


def _fill(
    model: Any, folder: str | Path, adapter: str, saved: dict[str, Tensor], head: Any
) -> None:
    """Copy an adapter's tensors into the model, and its `score.weight` into the head, if any.

    Raises:
        ValueError: if a name or a shape is another than the model's.
    """
    from peft.functional import get_peft_model_state_dict, set_peft_model_state_dict

    wanted = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    # peft also saves the base's own weight of an adapted head
    wanted |= {name: value for name, value in model.state_dict().items() if name in saved}
    if head is not None:
        wanted[SCORE_WEIGHT] = head.weight
    for name in sorted(wanted.keys() | saved.keys()):
        shapes = [tuple(state[name].shape) if name in state else None for state in (saved, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"model.path: the adapter in {folder} was not made for its base "
                f"{model.name_or_path}: {name} is {shapes[0]} in the adapter, expected {shapes[1]}"
            )
    if head is not None:
        with torch.no_grad():
            head.weight.copy_(saved.pop(SCORE_WEIGHT))
    set_peft_model_state_dict(model, saved, adapter_name=adapter)
