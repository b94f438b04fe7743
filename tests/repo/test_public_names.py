"""What users import and type changes only on purpose: rewrite the lists with

python tests/repo/test_public_names.py
"""

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

from fastalign.cli.algorithms import ALGORITHMS
from fastalign.cli.main import COMMANDS, main
from fastalign.cli.main import MODULES as PLACES
from tests.repo.structure import Checkout

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
        main([*arguments, "--help-all" if arguments[0] in ALGORITHMS else "--help"])
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())


def command_line_options() -> list[str]:
    os.environ["COLUMNS"] = "200"
    lines = []
    for command in COMMANDS:
        arguments = [command, "check"] if command == "data" else [command]
        options = sorted(
            set(re.findall(r"(?<![\w-])--[a-z](?:[\w.-]*\w)?\b", help_text(arguments)))
        )
        assert options, f"`fastalign {command} --help` shows no option"
        lines += [f"{' '.join(arguments)} {option}" for option in options]
    return lines


def test_public_names_are_the_recorded_ones() -> None:
    assert public_names() == NAMES_FILE.read_text().splitlines()


def test_command_line_options_are_the_recorded_ones() -> None:
    assert command_line_options() == OPTIONS_FILE.read_text().splitlines()


SAMPLING = {name for name, algorithm in ALGORITHMS.items() if algorithm.samples}
# Flags of messages by the modules that say them: the commands that reach them, if not all.
REACHED: dict[str, set[str]] = {
    "fastalign.cli.answers.sampling": {"generate", "eval", "win-rate"},
    "fastalign.cli.compare": {"compare"},
    "fastalign.cli.config_parse": set(ALGORITHMS),
    "fastalign.cli.flags": set(ALGORITHMS),
    "fastalign.cli.report": {"report", "frontier"},
    "fastalign.compare": {"compare"},
    "fastalign.data.load": {"sft", "dpo", "kto", "reward"},
    "fastalign.data.tokenizer": set(ALGORITHMS),
    "fastalign.models.exactness": set(ALGORITHMS),
    "fastalign.models.attention": set(ALGORITHMS),
    "fastalign.ranks": set(ALGORITHMS),
    "fastalign.report": {"report"},
    "fastalign.rollouts": {*SAMPLING, "generate", "eval", "win-rate"},
    "fastalign.runs": set(ALGORITHMS),
    "fastalign.trainers.sampling": SAMPLING,
    "fastalign.written_files": {
        *("estimate", "generate", "score", "label-by-reward", "eval", "win-rate"),
        *("frontier", "report", "merge", "new-model"),
    },
}
ONLY = {
    ("fastalign.data.load", "--data.ties"): {"dpo", "kto", "reward"},  # whose rows can be ties
    ("fastalign.data.load", "--loss"): {"dpo", "reward"},
    ("fastalign.runs.config", "--reference.path"): {"dpo", "kto"},  # whose section it is
    ("fastalign.models.exactness", "--packing"): {"eval"},  # the text says so
    ("fastalign.cli.config_parse", "--sampler"): SAMPLING,
    ("fastalign.cli.doctor", "--train.attention"): set(ALGORITHMS),  # of which it speaks
}
# Messages that come up for an adapter alone, which a reward model is not.
ONLY |= {
    (module, flag): set(ALGORITHMS) - {"reward"}
    for module, flag in (
        ("fastalign.runs.open", "--model.lora.base"),
        ("fastalign.data.tokenizer", "--model.lora.rank"),
    )
}
# Usage texts of commands that read their arguments themselves.
ONLY |= {
    ("fastalign.cli.settings", flag): {command}
    for command, flags in (
        ("estimate", ("--ranks", "--json", "--overwrite", "--config")),
        ("preflight", ("--timeout-seconds", "--world-size")),
    )
    for flag in flags
}
ALIKE = {"estimate", "preflight"}
OF_PIP = {"--force-reinstall", "--no-deps"}


def speakers(module: str, flag: str) -> set[str]:
    """The commands that can print a module's message with that flag."""
    if (module, flag) in ONLY:
        return ONLY[module, flag]
    for name, commands in REACHED.items():
        if module == name or module.startswith(f"{name}."):
            return commands
    part = module.removeprefix("fastalign.").split(".")
    if part[0] == "trainers":
        return {part[1].replace("_", "-")}
    names = {name for name, each in PLACES.items() if each.place.partition(":")[0] == module}
    return names or set(COMMANDS)


def flags_of_messages() -> Iterator[tuple[str, str]]:
    """Each module with a flag that one of its messages names; docstrings are no messages."""
    for module in Checkout().modules.values():
        nodes = list(ast.walk(module.tree))
        docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            text = re.sub(r"fastalign [a-z-]+ --\S+", "", node.value)  # another command's, named
            for flag in re.findall(r"(?<![\w-])--[a-z](?:[\w.-]*\w)?\b", text):
                if id(node) not in docs and node.value != flag and flag not in OF_PIP:
                    yield module.name, flag


def test_messages_name_flags_that_the_command_has() -> None:
    options: dict[str, set[str]] = {}
    for line in OPTIONS_FILE.read_text().splitlines():
        command, _, option = line.rpartition(" ")
        options.setdefault(command.split()[0], set()).add(option)
    found = set(flags_of_messages())
    assert len(found) > 40
    assert ONLY.keys() <= found
    missing = {
        f"{module}: {flag} is no flag of {command}"
        for module, flag in found
        for command in speakers(module, flag)
        # estimate and preflight take a training command's flags behind their own
        if flag not in options[command.split()[0]] | (options["dpo"] if command in ALIKE else set())
    }
    assert missing == set()


if __name__ == "__main__":
    NAMES_FILE.write_text("\n".join(public_names()) + "\n")
    OPTIONS_FILE.write_text("\n".join(command_line_options()) + "\n")
