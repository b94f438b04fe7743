"""A run's configuration: a YAML file as the defaults, flags over it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastalign.cli.flags import parse_flags

Config = TypeVar("Config")


def parse_config(config: type[Config], arguments: Sequence[str], command: str) -> Config:
    """The configuration that `--config FILE` and the flags behind it describe.

    Raises:
        ValueError: an unknown key in the file, an unknown flag, a value that does not fit.
        FileNotFoundError: there is no such file.
    """
    path, flags = take_option(arguments, "--config")
    defaults = {} if path is None else read_yaml(Path(path))
    return parse_flags(config, merge(config, defaults, path, flags), command, CONFIG_HELP)


CONFIG_HELP = (
    "--config FILE: a YAML file with these settings (model: path: ...); flags override it."
)


def merge(
    config: type, defaults: dict[str, Any], path: str | None, flags: Sequence[str]
) -> list[str]:
    """The file's settings as flags in front of the caller's: of two the last one counts."""
    from_file: list[str] = []
    for name, value in flatten(config, defaults, str(path)).items():
        section, dot, key = name.replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            from_file.append(f"--{section}{dot}{'' if value else 'no-'}{key}")
        elif isinstance(value, list):
            from_file += [f"--{section}{dot}{key}", *(str(item) for item in value)]
        else:
            from_file += [f"--{section}{dot}{key}", str(value)]
    return from_file + list(flags)


def take_option(arguments: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """The value of an option that is not tyro's, and the arguments without it.

    Raises:
        ValueError: it is there twice, or without a value.
    """
    value, rest, index = None, [], 0
    while index < len(arguments):
        word = arguments[index]
        index += 1
        if word != option and not word.startswith(f"{option}="):
            rest.append(word)
            continue
        if value is not None:
            raise ValueError(f"{option}: given twice")
        if word != option:
            value = word.removeprefix(f"{option}=")
        elif index < len(arguments) and not arguments[index].startswith("--"):
            value = arguments[index]
            index += 1
        else:
            raise ValueError(f"{option}: expected a value, got none")
    return value, rest


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping of sections.

    Raises:
        ValueError: not UTF-8, not YAML, or not a mapping.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config: no such file: {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected sections such as `optim:`, got {type(values).__name__}")
    return values


def flatten(config: type, values: dict[str, Any], path: str) -> dict[str, Any]:
    """`{"optim.lr": 1e-6}` from nested settings; every key must be a field of the dataclass.

    Raises:
        ValueError: an unknown section or key, or keys and values where a value belongs, or the
            reverse.
    """
    sections = [field.name for field in dataclasses.fields(config)]
    for section in values:
        if section not in sections:
            raise ValueError(
                f"{path}: unknown section {section!r}; expected one of {', '.join(sections)}"
            )
    return flatten_section(config, values, "", path)


def flatten_section(section_type: Any, content: Any, name: str, path: str) -> dict[str, Any]:
    """The settings of one section, `name` in front; a dataclass in it is a section of its own.

    The file itself is a section without a name.

    Raises:
        ValueError: an unknown key, or keys and values where a value belongs, or the reverse.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {name}: expected keys and values, got {content!r}")
    flat: dict[str, Any] = {}
    known: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(section_type)}
    for key, value in content.items():
        place = f"{name}.{key}" if name else str(key)
        if key not in known:
            raise ValueError(f"{path}: unknown key {place}; expected one of {', '.join(known)}")
        if dataclasses.is_dataclass(known[key]):
            flat |= flatten_section(known[key], value, place, path)
        elif isinstance(value, dict):
            raise ValueError(f"{path}: {place}: expected a value, got a mapping")
        else:
            flat[place] = value
    return flat
