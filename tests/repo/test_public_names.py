"""What users import and type changes only on purpose: rewrite the lists with

python tests/repo/test_public_names.py
"""

import contextlib
import importlib
import inspect
import io
import os
import re
from pathlib import Path

from fastalign.cli.main import COMMANDS, main

HERE = Path(__file__).parent
NAMES_FILE = HERE / "public_names.txt"
OPTIONS_FILE = HERE / "command_line_options.txt"
MODULES = ["fastalign", "fastalign.ops", "fastalign.losses", "fastalign.trainers"]


def public_names() -> list[str]:
    lines = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(module.__all__):
            value = getattr(module, name)
            signature = ""
            if inspect.isfunction(value):
                signature = "(" + ", ".join(inspect.signature(value).parameters) + ")"
            lines.append(f"{module_name}.{name}{signature}")
    return lines


def help_text(arguments: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())


def command_line_options() -> list[str]:
    os.environ["COLUMNS"] = "200"
    lines = []
    for command in COMMANDS:
        arguments = [command, "check"] if command == "data" else [command]
        options = sorted(set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", help_text(arguments))))
        assert options, f"`fastalign {command} --help` shows no option"
        lines += [f"{' '.join(arguments)} {option}" for option in options]
    return lines


def test_public_names_are_the_recorded_ones() -> None:
    assert public_names() == NAMES_FILE.read_text().splitlines()


def test_command_line_options_are_the_recorded_ones() -> None:
    assert command_line_options() == OPTIONS_FILE.read_text().splitlines()


if __name__ == "__main__":
    NAMES_FILE.write_text("\n".join(public_names()) + "\n")
    OPTIONS_FILE.write_text("\n".join(command_line_options()) + "\n")
