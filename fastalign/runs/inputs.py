"""Fingerprints of the inputs of a run, which its checkpoints keep and a resumed run compares.

An input is a dictionary of its parts (a file, a key of a configuration) to a hash or a plain value,
so that a difference can be named.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastalign.data.tokenizer import Tokenizer, eos_token_ids
from fastalign.models.load import model_fingerprint
from fastalign.models.lora import has_adapter
from fastalign.runs.config import TrainingConfig, flat_settings
from fastalign.written_files import sha256_of

# Keys of a configuration that say nothing about what the model computes.
NO_INPUT = (
    *("transformers_version", "_name_or_path", "architectures"),
    *("dtype", "torch_dtype", "use_cache"),
)
# Every input, as a message names it; by the names on the left --run.accept-changed takes them.
NAMES = {
    "data": "training data",
    "eval_data": "held-out data",
    "ptx_data": "data of ppo.ptx_data",
    "model": "starting model",
    "base": "frozen base in model.path",
    "reference": "frozen reference",
    "value": "starting value model",
    "reward": "reward",
    "tokenizer": "tokenizer",
}

Parts = Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run beside its model and its training data.

    Attributes:
        tokenizer: tokenizer of the model, or None.
        held_out: data of evaluations, with a `fingerprint`, or None.
        reference_fingerprint: fingerprint of a frozen reference, which a checkpoint does not hold
            and a resumed run must find again.
        others: parts of further inputs, by the names in `NAMES`.
    """

    tokenizer: Tokenizer | None = None
    held_out: Any = None
    reference_fingerprint: str | None = None
    others: Mapping[str, Parts] = field(default_factory=dict)


def fingerprints(config: TrainingConfig, model: Any, data: Any, inputs: Inputs) -> dict[str, Parts]:
    """Return the parts of every input; if ranks share the model, all of them call this.

    `model` is the policy or reward model before its first step; `data`, the training data, have a
    `fingerprint`.
    """
    reference = inputs.reference_fingerprint
    found: dict[str, Parts] = {
        "data": {"content": data.fingerprint},
        "base": {"weights": model_fingerprint(model) if has_adapter(model) else None},
        "reference": {"weights": reference},
        **inputs.others,
    }
    # The weights are hashed once: as the base, as the reference, or here.
    other = getattr(getattr(config, "reference", None), "path", None) is not None
    hashed = has_adapter(model) or (reference is not None and not other)
    found["model"] = model_parts(model, weights=not hashed)
    if inputs.held_out is not None:
        found["eval_data"] = {"path": config.data.eval, "content": inputs.held_out.fingerprint}
    if inputs.tokenizer is not None:
        found["tokenizer"] = tokenizer_parts(inputs.tokenizer, config.model.path)
    return found


def model_parts(model: Any, *, weights: bool = True) -> Parts:
    """Return a model's configuration key by key and, if asked for, a hash of its weights."""
    if not hasattr(model, "config"):
        return {}
    values = json.loads(model.config.to_json_string(use_diff=False))
    leaves = flat_settings(values).items()
    parts = {f"{key} of config.json": value for key, value in leaves if key not in NO_INPUT}
    if weights:
        parts["weights"] = model_fingerprint(model, configuration=False)
    return parts


def tokenizer_parts(tokenizer: Tokenizer, path: str) -> Parts:
    """Return hashes of the vocabulary and the chat template, and the tokens that end an answer."""
    return {
        "vocabulary": digest_of(json.dumps(sorted(tokenizer.get_vocab().items()))),
        "chat template": digest_of(json.dumps(tokenizer.chat_template)),
        "end tokens": list(eos_token_ids(tokenizer, path)),
    }


def file_parts(path: str | Path) -> Parts:
    """Return the hash of a file's bytes, by its name."""
    return {Path(path).name: sha256_of(Path(path))}


def digest_of(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def changed_inputs(saved: Mapping[str, Any], now: Mapping[str, Parts]) -> dict[str, str]:
    """Compare a resumed run's inputs with those in a checkpoint's `state.json`.

    A key of a configuration that one side alone has is not compared: another release of
    transformers has other keys.

    Returns:
        For each input that differs, the words of a message for it, with the parts that differ.
    """
    before = saved.get("inputs") or {
        "data": {"content": saved.get("data_fingerprint")},  # of an earlier version
        "base": {"weights": saved.get("base_fingerprint")},
        "reference": {"weights": saved.get("reference_fingerprint")},
    }
    changed: dict[str, str] = {}
    for name in (name for name in NAMES if name in before and name in now):
        old, new = before[name], now[name]
        of_config = " of config.json"
        keys = [key for key in new if key in old or not key.endswith(of_config)]
        keys += [key for key in old if key not in new and not key.endswith(of_config)]
        differing = [key for key in keys if old.get(key) != new.get(key)]
        if differing and not (name == "eval_data" and "path" in differing):  # the setting changed
            changed[name] = described(name, old, new, differing)
    return changed


def described(name: str, old: Parts, new: Parts, differing: list[str]) -> str:
    """Return an input's name with the parts that differ, plain values with both sides."""
    words = []
    for key in differing:
        plain = not isinstance(old.get(key), str) or len(old[key]) < 64
        values = f" {json.dumps(old.get(key))}, now {json.dumps(new.get(key))}" if plain else ""
        words.append(key + values)
    if words in (["content"], ["weights"]) or name in ("base", "reference"):
        return NAMES[name]
    return f"{NAMES[name]} ({'; '.join(words[:4])}{'; ...' if len(words) > 4 else ''})"
