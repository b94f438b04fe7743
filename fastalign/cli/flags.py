"""Dataclasses to flags, through tyro; whatever is wrong with them becomes one line."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from fastalign.cli.masking import refuse_secrets

Config = TypeVar("Config")
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
