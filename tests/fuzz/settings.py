"""Random flags and YAML files: a command runs with them, or refuses them in one line.

A case takes a valid command and changes one to three of its options, as flags or in the file:
numbers of any size and none, words, nothing, names that do not exist, keys twice, other types.
"""

import contextlib
import dataclasses
import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastalign.cli.main import main
from fastalign.runs.config import config_to_dict
from tests.ranks.test_ranks import TRAINERS

OPTIONS = Path(__file__).parents[1] / "repo/command_line_options.txt"
ODD = (
    *("0", "-1", "1", "2", "3", "7", "0.5", "-0.5", "1e-300", "1e300", "nan", "inf", "-inf"),
    *("9" * 12, "9" * 25, "-" + "9" * 25, "010", "1:30", "0x10", "1_0", "1e3", "", " ", "none"),
    *("None", "true", "yes", "auto", "cpu", "caf\u00e9", "\x1b[2J", "\u202e", "a" * 300, "--x"),
    *("[1, 2]", "{a: 1}", "!!int x", "&a [*a]", "~", ".inf", "2024-01-02", "'1'", "nowhere/at/all"),
)
# What would take minutes, other machines, or a server: not the settings, but the harness's time.
LEFT_OUT = (
    "config",
    "help",
    "model.path",
    "compile",
    "vllm",
    "sampler",
    "judge",
    "device",
    "run.dir",
)
MODEL, OUT = ["--model.path", "llama"], ["--out", "out/out.jsonl"]
FEW = {
    "train": {"max_steps": 2, "batch_size": 2},
    "sampling": {"max_new_tokens": 3, "num_samples": 2},
}


def kinds_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """Each option of a configuration with its field's type."""
    found: dict[str, Any] = {}
    hints = get_type_hints(type(config))
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            found |= kinds_of(value, f"{prefix}{entry.name}.")
        else:
            found[prefix + entry.name] = hints[entry.name]
    return found


def literals(kind: Any) -> list[str]:
    """The names that a field may have."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    return [name for part in get_args(kind) for name in literals(part)]


def fitting(kind: Any) -> list[str]:
    """Values that a field's type takes, if not always its range."""
    plain = str(kind)
    values = literals(kind)
    if "float" in plain:
        values += ["0", "0.5", "1", "2", "1e-300", "1e300", "-1", "0.9"]
    if "int" in plain:
        values += ["0", "1", "2", "3", "7", "40", "-1", "9" * 12]
    return values or list(ODD)


@cache
def options_of(command: str) -> list[str]:
    """The options that the help of a command lists, without dashes."""
    lines = (line.rpartition(" --") for line in OPTIONS.read_text().splitlines())
    names = [option for owner, _, option in lines if owner == command]
    return [name for name in names if not any(word in name for word in LEFT_OUT)]


class Stage:
    """A folder with a model and data, and a small run of each trainer as flags or YAML."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values, self.kinds = {}, {}
        for trainer, (make, _) in TRAINERS.items():
            config = make(folder, "unnamed")
            values = config_to_dict(config)
            for section, few in FEW.items():
                if section in values:
                    values[section] |= few
            self.values[trainer], self.kinds[trainer] = values, kinds_of(config)
        self.others = {
            "generate": [*MODEL, "--data.prompts", "prompts.jsonl", *OUT],
            "data check": ["pairs.jsonl"],
            "estimate": ["dpo", *MODEL, "--data.train", "pairs.jsonl", "--run.dir", "run"],
            "score": [*MODEL, "--data.samples", "prompts.jsonl", *OUT],
            "eval": [*MODEL, "--reference.path", "llama", "--data.pairs", "pairs.jsonl", *OUT],
            "report": ["nowhere"],
            "new-model": ["--data.train", "texts.jsonl", "--vocab-size", "300", "--out", "new"],
            "merge": [*MODEL, "--out", "merged"],
            "label-by-reward": ["--data.samples", "prompts.jsonl", *OUT],
            "doctor": ["--device", "cpu"],
        }


def arguments_of(seed: int, stage: Stage) -> list[str]:
    """The command line that a seed stands for; its file, if it has one, is written."""
    chance = random.Random(seed)
    if chance.random() < 0.2:
        command = chance.choice(list(stage.others))
        flags = list(stage.others[command])
        for option in chance.sample(options_of(command), min(2, len(options_of(command)))):
            flags += [f"--{option}", *chance.sample(ODD, chance.choice([0, 1, 1, 1, 2]))]
        return [*command.split(), *flags]
    trainer = chance.choice(list(TRAINERS))
    kinds = stage.kinds[trainer]
    values = json.loads(json.dumps(stage.values[trainer]))
    names = [name for name in kinds if not any(word in name for word in LEFT_OUT)]
    flags: list[str] = []
    lines: list[str] = []
    for name in chance.sample(names, chance.choice([1, 2, 2, 3])):
        kind, flag = kinds[name], f"--{name.replace('_', '-')}"
        value = chance.choice(fitting(kind) if chance.random() < 0.6 else ODD)
        if name == "train.max_steps" and len(value) > 4:
            value = "3"  # a run of that length is what was asked for
        match chance.randrange(12):
            case 0:
                flags += [f"--{name}{chance.choice(['x', '', '.y'])}", value]
            case 1:
                flags += [flag, value, chance.choice(ODD)]
            case 2:
                lines.append(f"{name.partition('.')[0]}: {value}")
            case 3:
                set_in(values, name, chance.choice([[value], {"a": value}, None, True, 3]))
            case 4 | 5 | 6:
                set_in(values, name, chance.random() < 0.5 if kind is bool else value)
            case _ if kind is bool:
                section, _, last = flag.rpartition(".")
                flags.append(f"{section}.{chance.choice(['', 'no-'])}{last}")
            case _ if "tuple" in str(kind):
                flags += [flag, *[value] * chance.randint(1, 3)]
            case _:
                flags += [flag, value]
    file = stage.folder / f"{seed}.yaml"
    file.write_text("\n".join([json.dumps(values)] if not lines else [block(values), *lines]))
    return [trainer, "--config", str(file), "--run.dir", f"run-{seed}", *flags]


def set_in(values: dict[str, Any], name: str, value: Any) -> None:
    """Set a nested value."""
    *sections, key = name.split(".")
    for section in sections:
        inner = values.get(section)
        values = inner if isinstance(inner, dict) else values
    values[key] = value


def block(values: dict[str, Any]) -> str:
    """The sections as YAML, each a line of JSON."""
    return "\n".join(f"{name}: {json.dumps(content)}" for name, content in values.items())


def outcome(seed: int, stage: Stage) -> str:
    """Run the case's command; return how it ended.

    Raises:
        AssertionError: if it was refused in other than one line.
    """
    arguments = arguments_of(seed, stage)
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(stage.folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = main(arguments)
        except SystemExit as stop:  # of --help
            code = int(stop.code or 0)
    said = [line for line in err.getvalue().splitlines() if line.startswith("fastalign")]
    where = f"{arguments}: exit code {code}: {err.getvalue()[-800:]}"
    assert code in (0, 1, 2, 3), where
    if code == 2 and arguments[0] != "data":
        assert len(said) == 1, where
        assert len(said[0]) < 2500, where
    assert not set("\x1b\u202e") & set(out.getvalue() + err.getvalue()), where
    return {0: "ran", 1: "ran", 2: "refused in one line", 3: "ran, collapsed"}[code]
