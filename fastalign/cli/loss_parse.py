"""A configuration whose loss is chosen by `--loss NAME`."""

from collections.abc import Mapping, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastalign.cli.config_parse import CONFIG_HELP, merge, read_yaml, take_option
from fastalign.cli.flags import parse_flags

Config = TypeVar("Config")


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
