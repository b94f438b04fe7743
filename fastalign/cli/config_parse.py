"""A run's configuration: a YAML file as the defaults, flags over it."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from fastalign.cli.masking import refuse_secrets

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


def parse_with_loss(
    config: type[Config], losses: Mapping[str, type[Any]], arguments: Sequence[str], command: str
) -> Config:
    """The configuration of a run; only the chosen loss's parameters are flags.

    `--loss NAME` over a file that has another loss also puts aside that loss's parameters.

    Args:
        config: has a field `loss`.
        losses: a dataclass for each name; the first is the default.
        arguments: as typed.
        command: for the help.

    Raises:
        ValueError: an unknown loss, or anything that `parse_config` refuses.
    """
    default = next(iter(losses))
    path, rest = take_option(arguments, "--config")
    chosen, flags = take_option(rest, "--loss")
    values = {} if path is None else read_yaml(Path(path))
    section = values.get("loss") or {}
    if isinstance(section, str):
        section = {"name": section}
    if not isinstance(section, dict):
        raise ValueError(f"{path}: loss: expected keys and values, got {section!r}")
    in_file = section.get("name", default)
    name = chosen or in_file
    if name not in losses:
        where = "--loss" if chosen else f"{path}: loss.name"
        raise ValueError(f"{where}: expected one of {', '.join(losses)}, got {name!r}")
    parameters = {key: value for key, value in section.items() if key != "name"}
    values = {**values, "loss": parameters if name == in_file else {}}
    narrowed = with_loss(config, losses[name])
    names = f"--loss NAME: {', '.join(losses)} (default: {default})."
    return parse_flags(
        narrowed, merge(narrowed, values, path, flags), command, f"{CONFIG_HELP}\n\n{names}"
    )


def with_loss(config: type[Config], loss: type[Any]) -> type[Config]:
    """The configuration with one of the losses, so that its parameters alone are flags."""
    section = ("loss", loss, field(default_factory=loss))
    documented = {"__doc__": config.__doc__}
    return make_dataclass(
        config.__name__, [section], bases=(config,), namespace=documented, frozen=True
    )


_FRAME = re.compile(r"[│╭╮╰╯─]+|(?<!\S)-{9,}(?!\S)")  # of dashes where a terminal has no lines
_OF_VALUE = re.compile(r"^Value error Error parsing [^:]*: (?=\S+: )")


def parse_flags(
    config: type[Config], arguments: Sequence[str], command: str, more_help: str = ""
) -> Config:
    """The dataclass that the flags describe; `--help` prints them and leaves with code 0.

    Raises:
        ValueError: an unknown flag, a missing one, a value that does not fit, or a secret in one.
    """
    refuse_secrets(arguments)
    errors = io.StringIO()
    text = "\n\n".join(part for part in (config.__doc__, more_help) if part)
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(config, prog=command, args=list(arguments), description=text)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(one_line(errors.getvalue())) from None


def one_line(text: str) -> str:
    """Tyro's framed message without its frame, its lines joined."""
    plain: Any = re.sub(r"\x1b\[[0-9;]*m", "", text)
    words = " ".join(_FRAME.sub(" ", plain).split())
    words = words.removeprefix("Parsing error ").removeprefix("Unrecognized options ")
    return _OF_VALUE.sub("", words)  # our own messages name the argument themselves
