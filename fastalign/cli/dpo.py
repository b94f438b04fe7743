"""`fastalign dpo`: DPO and its relatives, the loss chosen by `--loss NAME`."""

from collections.abc import Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

from fastalign.cli.config_parse import CONFIG_HELP, merge, read_yaml, take_option
from fastalign.cli.flags import parse_flags
from fastalign.trainers import LOSSES, DPOConfig, train_dpo


def parse_dpo(arguments: Sequence[str]) -> DPOConfig:
    """The configuration of a run; only the chosen loss's parameters are flags.

    `--loss NAME` over a file that has another loss also puts aside that loss's parameters.

    Raises:
        ValueError: an unknown loss, or anything that `parse_config` refuses.
    """
    path, rest = take_option(arguments, "--config")
    chosen, flags = take_option(rest, "--loss")
    values = {} if path is None else read_yaml(Path(path))
    section = values.get("loss") or {}
    if isinstance(section, str):
        section = {"name": section}
    if not isinstance(section, dict):
        raise ValueError(f"{path}: loss: expected keys and values, got {section!r}")
    in_file = section.get("name", "dpo")
    name = chosen or in_file
    if name not in LOSSES:
        where = "--loss" if chosen else f"{path}: loss.name"
        raise ValueError(f"{where}: expected one of {', '.join(LOSSES)}, got {name!r}")
    parameters = {key: value for key, value in section.items() if key != "name"}
    values = {**values, "loss": parameters if name == in_file else {}}
    config = config_with_loss(LOSSES[name])
    names = f"--loss NAME: {', '.join(LOSSES)} (default: dpo)."
    parsed: DPOConfig = parse_flags(
        config, merge(config, values, path, flags), "fastalign dpo", f"{CONFIG_HELP}\n\n{names}"
    )
    return parsed


def config_with_loss(loss: type[Any]) -> type[DPOConfig]:
    """DPOConfig whose loss is one of the dataclasses, so that its parameters alone are flags."""
    section = ("loss", loss, field(default_factory=loss))
    documented = {"__doc__": DPOConfig.__doc__}
    return make_dataclass(
        "DPOConfig", [section], bases=(DPOConfig,), namespace=documented, frozen=True
    )


def main(argv: Sequence[str]) -> int:
    """Exit code 0, or 130 after SIGINT; either way the run can be resumed."""
    return train_dpo(parse_dpo(argv)).exit_code
