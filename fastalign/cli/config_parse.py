"""Parse a command's configuration: defaults from a YAML file, overridden by flags."""

import copy
import dataclasses
import inspect
import io
import re
import reprlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from fastalign.cli.flags import (
    CONFIG_HELP,
    LOSSES_ELSEWHERE,
    field_doc,
    short_help,
    wrapped,
    wrong_flags,
)
from fastalign.in_memory import is_given
from fastalign.nearest import did_you_mean, nearest, nearest_path
from fastalign.output import plain_stream, refuse_secrets
from fastalign.rollouts.engines.options import PROCESS_IS_GONE
from fastalign.runs.config import check_numbers
from fastalign.yaml_file import read_yaml_file

Config = TypeVar("Config")


def parse_config(
    config: type[Config],
    arguments: Sequence[str],
    command: str,
    choices: Mapping[str, Mapping[str, type[Any]]] | None = None,
) -> Config:
    """Return the configuration that `--config FILE` and the flags behind it describe.

    `choices` are the settings that are one of several dataclasses, each with its table: only the
    flags of the chosen one exist.

    Raises:
        ValueError: if a key, a flag or a name is unknown, or a value does not fit.
        FileNotFoundError: if there is no such file.
    """
    if {"-h", "--help"} & set(arguments) and "--help-all" not in arguments:
        print(short_help(config, command, choices or {}))
        raise SystemExit(0)
    path, flags = take_option(arguments, "--config")
    values = {} if path is None else read_yaml(Path(path))
    notes, shape = [f"{CONFIG_HELP} These are all flags (`--help-all`)."], config
    for setting, table in (choices or {}).items():
        chosen, flags, values = take_choice(setting, table, flags, values, path)
        shape = narrowed(shape, setting.split("."), chosen)
        names = f"{', '.join(table)} (default: {next(iter(table))})"
        notes.append(f"Choices for `--{setting} NAME`: {names}.")
    words = merge(shape, values, path, flags)
    return parse_flags(shape, words, command, "\n\n".join(notes), [*(choices or {}), "config"])


def merge(
    config: type, defaults: dict[str, Any], path: str | None, flags: Sequence[str]
) -> list[str]:
    """Return the file's settings as flags in front of the caller's; the last of two counts."""
    from_file: list[str] = []
    for name, value in flatten(config, defaults, str(path)).items():
        section, dot, key = name.replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            from_file.append(f"--{section}{dot}{'' if value else 'no-'}{key}")
        else:
            items = value if isinstance(value, list) else [value]
            from_file += [f"--{section}{dot}{key}", *map(str, items)]
    return from_file + list(flags)


def take_option(arguments: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """Return the value of an option that tyro does not parse, and the other arguments.

    Raises:
        ValueError: if the option is given twice, or without a value.
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
    """Return the file's mapping of sections.

    Raises:
        ValueError: if the file is not UTF-8, not YAML, or not a mapping.
        FileNotFoundError: if the file does not exist.
    """
    if not path.is_file():
        like = did_you_mean(nearest_path(path))
        raise FileNotFoundError(f"--config: no such file: {path}{like}")
    values = read_yaml_file(path, numbers_as_text=True)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected sections such as `optim:`, got {type(values).__name__}")
    return values


def flatten(section_type: Any, content: Any, path: str, name: str = "") -> dict[str, Any]:
    """Return the settings of the section `name` ("" is the file) as `{"optim.lr": 1e-6}`.

    Raises:
        ValueError: if a key is unknown, or a mapping stands where a value is expected or the
            reverse.
    """
    if not isinstance(content, dict):
        got = reprlib.repr(content)
        raise ValueError(f"{path}: {name}: expected keys and values, got {got}")
    flat: dict[str, Any] = {}
    known = {field.name: field for field in dataclasses.fields(section_type)}
    for key, value in content.items():
        place = f"{name}.{key}" if name else str(key)
        if key not in known:
            what = f"key {place}" if name else f"section {key!r}"
            raise ValueError(f"{path}: unknown {what}; expected one of {', '.join(known)}")
        kind: Any = known[key].type
        if dataclasses.is_dataclass(kind):
            flat |= flatten(kind, value, path, place)
        else:
            if "metavar" in known[key].metadata:
                value = with_weights(value)
            check_value(value, kind, f"{path}: {place}")
            flat[place] = value
    return flat


def with_weights(value: Any) -> Any:
    """Return sources with weights as flags have them, `a.jsonl:2`.

    A file may also hold `a.jsonl: 2`, as a mapping or as an item of a list.
    """
    if not isinstance(value, list | dict):
        return value
    words: list[Any] = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            words += [s if weight is None else f"{s}:{weight}" for s, weight in item.items()]
        else:
            words.append(item)
    return words


def check_value(value: Any, field_type: Any, where: str) -> None:
    """Raise ValueError if a field's flag does not take such a value of a file.

    It is a mapping, a list, a boolean or null where the field takes none, or looks like a flag.
    """
    kinds = {get_origin(kind) or kind for kind in (field_type, *get_args(field_type))}
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) and tuple not in kinds:
        raise ValueError(f"{where}: expected one value, got a list")
    for item in items:
        if isinstance(item, dict | list):
            kind = "mapping" if isinstance(item, dict) else "list in a list"
            raise ValueError(f"{where}: expected a value, got a {kind}")
        if isinstance(item, bool) and bool not in kinds:
            word = str(item).lower()
            raise ValueError(f"{where}: expected no boolean, got {word} (text stands in quotes)")
        if item is None and NoneType not in kinds:
            raise ValueError(f"{where}: expected a value, got null")
        if isinstance(item, str) and item.startswith("--"):
            raise ValueError(f"{where}: expected a value, got {item!r}, which is a flag")


def take_choice(
    setting: str,
    table: Mapping[str, type[Any]],
    flags: Sequence[str],
    values: dict[str, Any],
    path: str | None,
) -> tuple[type[Any], list[str], dict[str, Any]]:
    """Resolve a setting that is one of several dataclasses, named by `--SETTING NAME` or the file.

    `--loss NAME` over a file that names another loss also discards that loss's parameters.

    `setting` is a dotted name (`ppo.advantage`), and the first dataclass of its table the default.

    Returns:
        The dataclass, the flags without the choice, and the file's settings without the name.

    Raises:
        ValueError: if the name is not in the table, or the file holds something else there.
    """
    *sections, key = setting.split(".")
    option = f"--{setting}"
    chosen, rest = take_option(flags, option)
    values = copy.deepcopy(values)
    owner: Any = values
    for section in sections:
        owner = owner.get(section) or {} if isinstance(owner, dict) else {}
    content = (owner.get(key) if isinstance(owner, dict) else None) or {}
    if isinstance(content, str):
        content = {"name": content}
    if not isinstance(content, dict):
        got = reprlib.repr(content)
        raise ValueError(f"{path}: {setting}: expected keys and values, got {got}")
    in_file = content.pop("name", next(iter(table)))
    name = chosen or in_file
    if not isinstance(name, str) or name not in table:
        where = option if chosen else f"{path}: {setting}.name"
        like = did_you_mean(nearest(LOSSES_ELSEWHERE.get(str(name).lower(), str(name)), table))
        raise ValueError(
            f"{where}: expected one of {', '.join(table)}, got {reprlib.repr(name)}{like}"
        )
    if isinstance(owner, dict) and key in owner:
        owner[key] = content if name == in_file else {}
    return table[name], rest, values


def narrowed(config: type[Any], names: Sequence[str], chosen: type[Any]) -> type[Any]:
    """Return the configuration with one field's type narrowed, so that its flags alone exist.

    Its default is the configuration's own if that is such a dataclass, else that of the dataclass.
    """
    name, *rest = names
    (entry,) = (entry for entry in dataclasses.fields(config) if entry.name == name)
    make: Any = entry.default_factory
    if rest:
        owner = type(make()) if make is not dataclasses.MISSING else entry.type
        chosen = make = narrowed(owner, rest, chosen)  # type: ignore[arg-type]
    elif make is dataclasses.MISSING or type(make()) is not chosen:
        make = chosen
    section = (name, chosen, dataclasses.field(default_factory=make))
    documented = {"__doc__": config.__doc__}
    return dataclasses.make_dataclass(
        config.__name__, [section], bases=(config,), namespace=documented, frozen=True
    )


_FRAME = re.compile(r"[│╭╮╰╯─]+|(?<!\S)-{9,}(?!\S)")  # of dashes where a terminal has no lines
_REQUIRED = re.compile(r"(?:Missing from [^:]*: |\(required\) )(--\S+|[A-Z]+\b)")
_OF_VALUE = re.compile(r"^Value error Error parsing [^:]*: (?=\S+: )")
_NO_NUMBER = re.compile(r"^Value error Error parsing (--\S+): (.*?) Argument helptext: .*")
_CHOICE = re.compile(r"invalid choice '(.*?)' for argument '(--\S+)'\. Expected one of \((.*?)\)")


def parse_flags(
    config: type[Config],
    arguments: Sequence[str],
    command: str,
    more_help: str = "",
    more_flags: Sequence[str] = (),
) -> Config:
    """Return the dataclass that the flags describe.

    `--help` and `--help-all` print every flag and exit with code 0. `more_flags` are names that
    exist, too, and are parsed elsewhere.

    Raises:
        ValueError: if a flag is unknown, missing, does not fit, or holds a secret.
    """
    refuse_secrets(arguments)
    words = ["--help" if word == "--help-all" else word for word in last_sampler(arguments)]
    errors = io.StringIO()
    text = wrapped("\n\n".join(part for part in (inspect.getdoc(config), more_help) if part))
    try:
        with redirect_stderr(errors), redirect_stdout(plain_stream(sys.stdout)):
            parsed = tyro.cli(config, prog=command, args=words, description=text, registry=REGISTRY)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(one_line(errors.getvalue(), wrong_flags(config, words, more_flags))) from (
            None
        )
    check_numbers(parsed)
    return parsed


REGISTRY = ConstructorRegistry()


def lacks_values(section: Any) -> bool:
    """Return whether a default is a section with a setting that has none."""
    if not dataclasses.is_dataclass(section):
        return False
    return not all(is_given(getattr(section, one.name)) for one in dataclasses.fields(section))


@REGISTRY.struct_rule
def section_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Describe a dataclass of settings to tyro, each field with its docstring on one line."""
    if not dataclasses.is_dataclass(info.type):
        return None
    hints = get_type_hints(info.type, include_extras=True)
    specs = []
    for entry in dataclasses.fields(info.type):
        default: Any = MISSING_NONPROP
        if isinstance(info.default, info.type):
            default = getattr(info.default, entry.name)
        elif entry.default is not dataclasses.MISSING:
            default = entry.default
        elif entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        if not is_given(default) or lacks_values(default):
            default = MISSING_NONPROP
        kind = hints[entry.name]
        if metavar := entry.metadata.get("metavar"):
            kind = Annotated[kind, tyro.conf.arg(metavar=metavar)]
        if default is None or default == ():  # the text says what no value means
            kind = Annotated[kind, tyro.conf.arg(help_behavior_hint="")]
        text = entry.metadata.get("help") or partial(field_doc, info.type, entry.name)
        specs.append(StructFieldSpec(entry.name, kind, default, text))
    specs.sort(key=lambda spec: spec.default is not MISSING_NONPROP)  # the help begins with these
    return StructConstructorSpec(info.type, tuple(specs))


def last_sampler(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the last `--sampler` alone.

    A file of an earlier version may name one that is gone, which a flag can override.

    Raises:
        ValueError: if the last one is gone; the message names what replaces it.
    """
    words = [w for word in arguments for w in re.split("(?<=^--sampler)=", word)]
    places = [number for number, word in enumerate(words) if word == "--sampler"]
    if places and words[places[-1] + 1 :][:1] == ["vllm-process"]:
        raise ValueError(PROCESS_IS_GONE)
    for place in reversed(places[:-1]):
        del words[place : place + 2]
    return words


def one_line(text: str, wrong: Mapping[str, str]) -> str:
    """Return tyro's framed error message as one line, without its frame.

    `wrong` flags (see `wrong_flags`) stand in front, without tyro's own words about them.
    """
    plain: Any = re.sub(r"\x1b\[[0-9;]*m", "", text)
    words = " ".join(_FRAME.sub(" ", plain).split())
    words, _, command = words.rpartition("For full helptext, ")
    command = command.removeprefix("run: ").removeprefix("run ").removeprefix("see ")
    required = _REQUIRED.findall(words)
    typed = {word for instead in wrong.values() for word in instead.split()}
    missing = [name for name in required if name not in typed]
    if wrong:
        words = "; ".join(f"{name}: {instead}" for name, instead in wrong.items())
        words += f"; required, but not given: {', '.join(missing)}" if missing else ""
    elif required:
        unknown = words.rpartition("Unrecognized options: ")[2] if "Unrecognized" in words else ""
        words = f"required, but not given: {', '.join(required)}"
        words += f"; unrecognized: {unknown.strip()}" if unknown else ""
    words = words.removeprefix("Parsing error ").removeprefix("Missing argument ")
    words = words.removeprefix("Unrecognized options ")
    words = _OF_VALUE.sub("", words)  # our own messages name the argument themselves
    words = _NO_NUMBER.sub(r"\1: \2", words)
    if choice := _CHOICE.search(words):
        got, flag, known = choice.groups()
        names = re.findall(r"'([^']*)'", known)
        like = did_you_mean(nearest(got, names))
        words = f"{flag}: expected one of {', '.join(names)}, got {got!r}{like}"
    return f"{words.strip()} (see {command})" if command else words
