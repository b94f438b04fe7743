"""Files of a model's folder: an error of the library that reads them, as one line that names one.

transformers, tokenizers, peft and safetensors raise whatever comes up on a damaged file, and few
of these errors say which file it was. So the files are looked at once a library has failed.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastalign.compute import is_out_of_memory

CONFIGURATIONS = ("config.json", "generation_config.json")
WEIGHTS = ("model*.safetensors", "*.index.json")
TOKENIZER = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*"),
    *("chat_template*", "config.json"),
)
LONGEST = 300  # characters of a library's text
# Formats of numbers that a weight may have; others are of quantised or damaged files.
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@contextmanager
def reading(what: str, path: str | Path, *patterns: str) -> Iterator[None]:
    """Turn whatever a library raises in the context into a ValueError of one line.

    An error of memory passes through.

    Args:
        what: beginning of the message.
        path: the model's folder, or a hub name, of which no file is named.
        patterns: names of the files that the library reads there; if none of them is damaged and
            the first is one file's, that is named.

    Raises:
        ValueError: with the first damaged file and its fault, or else the library's own reason.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = fault_of_files(path, *patterns) or reason_of(error)
        if len(patterns) == 1 and patterns[0] not in reason and Path(path).is_dir():
            reason = f"{patterns[0]}: {reason}"
        raise ValueError(f"{what}: {reason}") from error


def reason_of(error: BaseException, *, said: str = "") -> str:
    """Return the beginning of an error's text in one line, without the words already `said`.

    A rare kind of error is named.
    """
    if isinstance(error, UnpicklingError):  # torch's own text explains how to run it anyway
        return "a file is a pickle of more than tensors, which is not run"
    lines = str(error).removeprefix(said).strip().splitlines() or [""]
    text = lines[0] if not lines[0].endswith(":") else " ".join(lines[:2])
    if type(error).__name__.startswith("StrictDataclass"):  # of transformers' configurations
        text = f"config.json: {text.removeprefix('Validation error for ')}"
    elif not isinstance(error, OSError | ValueError | SafetensorError):
        text = f"{type(error).__name__}: {text}"
    return shorten(text, LONGEST, placeholder=" ...")


def fault_of_files(path: str | Path, *patterns: str) -> str | None:
    """Return `name: fault` of the first damaged file of these names; None if there is none."""
    folder = Path(path).expanduser()
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        fault = fault_of_file(file) if file.is_file() else None
        if fault is not None:
            return f"{file.name}: {fault}"
    return None


def fault_of_file(file: Path) -> str | None:
    """Return the fault of a file by its ending, or None."""
    try:
        if file.suffix == ".safetensors":
            return fault_of_tensors(file)
        if file.suffix == ".json":
            return fault_of_json(file.name, read_object(file))
        if file.suffix in (".txt", ".jinja"):
            file.read_text(encoding="utf-8")
    except (OSError, ValueError, SafetensorError) as error:
        return reason_of(error, said=f"{file}: ")
    return None


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: if it holds something else; names the file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected a JSON object: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got a {type(content).__name__}")
    return content


def fault_of_json(name: str, content: dict[str, Any]) -> str | None:
    """Return what libraries would trip over in an object that JSON can hold."""
    if name.endswith(".index.json"):
        files = content.get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            return "expected a weight_map of tensors' names to files"
        if not isinstance(content.get("metadata", {}), dict):
            return "expected an object as metadata"
    if name == "config.json":
        numbers = {key: value for key, value in content.items() if isinstance(value, float)}
        bad = [key for key, value in numbers.items() if not math.isfinite(value)]
        if bad:
            return f"{bad[0]} is {numbers[bad[0]]}, expected a finite number"
    if name == "tokenizer.json":
        return fault_of_tokenizer(content)
    return None


def fault_of_tokenizer(content: dict[str, Any]) -> str | None:
    """Return why the tokenizers library does not take the content of a `tokenizer.json`."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library's bindings raise no other class
        return reason_of(error).removeprefix("Exception: ")
    return None


def format_of_weights(path: str | Path) -> str | None:
    """Return the format that most bytes of a folder's safetensors files have, such as BF16.

    Of a hub name, or a folder without such files, None is returned.
    """
    sizes: Counter[str] = Counter()
    for file in Path(path).expanduser().glob("model*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                part = opened.get_slice(name)
                kind = part.get_dtype()
                if kind in FLOATS:
                    sizes[kind] += math.prod(part.get_shape()) * FLOATS[kind].itemsize
    return sizes.most_common(1)[0][0] if sizes else None


def fault_of_tensors(file: Path) -> str | None:
    """Return the fault of a safetensors file's header, which says what the file must hold."""
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - no mapping
            dtype = opened.get_slice(name).get_dtype()
            if name.endswith(".weight") and dtype not in FLOATS:
                return f"{name} holds numbers of the format {dtype}, expected {', '.join(FLOATS)}"
    return None
