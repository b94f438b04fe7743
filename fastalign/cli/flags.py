"""Names of a command's flags: the few that `--help` shows, and what a wrong one may have meant."""

import ast
import inspect
import itertools
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple, get_type_hints

from fastalign.in_memory import is_given
from fastalign.nearest import nearest

CONFIG_HELP = "Settings can also come from a YAML file, `--config FILE`; flags override it."
# Flags of TRL and transformers, and common guesses: the first of ours that the command has. One
# with a value of its own does not take over the value that was given.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("model-name-or-path", "model-name", "model-path"), ("model.path",)),
    **dict.fromkeys(
        ("dataset-name", "dataset", "train-file", "train-dataset", "train-data"),
        ("data.train", "data.prompts", "data.samples"),
    ),
    **dict.fromkeys(("eval-dataset", "eval-file", "eval-data"), ("data.eval",)),
    **dict.fromkeys(("output-dir", "output", "out", "run-dir"), ("run.dir", "out")),
    "learning-rate": ("optim.lr",),
    "lr-scheduler-type": ("optim.schedule",),
    "max-grad-norm": ("optim.grad-clip",),
    "adam-epsilon": ("optim.eps",),
    "num-train-epochs": ("train.epochs",),
    "num-epochs": ("train.epochs",),
    "per-device-train-batch-size": ("train.batch-size",),
    "train-batch-size": ("train.batch-size",),
    "eval-steps": ("train.eval-every",),
    "save-steps": ("train.save-every",),
    "save-total-limit": ("train.keep-checkpoints",),
    "metric-for-best-model": ("train.best-metric",),
    "load-best-model-at-end": ("train.best-metric eval_loss",),
    "greater-is-better": ("train.best-direction max",),
    "early-stopping-patience": ("train.patience",),
    **dict.fromkeys(
        ("dataset-mixer", "dataset-mixer-list", "data-mixture", "data-weights", "data-probs"),
        ("data.train a.jsonl:2 b.jsonl:1",),
    ),
    "bf16": ("train.precision bf16",),
    "attn-implementation": ("train.attention",),
    "resume-from-checkpoint": ("run.resume",),
    "max-seq-length": ("data.max-length",),
    "loss-type": ("loss",),
    "beta": ("loss.beta", "kl.coefficient", "loss.jsd.beta"),
    **dict.fromkeys(("teacher-model-name-or-path", "teacher-model"), ("teacher.path",)),
    "kl-coef": ("kl.coefficient",),
    **dict.fromkeys(("rpo-alpha", "cpo-alpha", "nll-weight"), ("loss.nll-coefficient",)),
    "simpo-gamma": ("loss.gamma",),
    "label-smoothing-factor": ("loss.label-smoothing",),
    "z-loss": ("loss.z-coefficient",),
    "desirable-weight": ("loss.desirable-weight",),
    "undesirable-weight": ("loss.undesirable-weight",),
    **dict.fromkeys(("cliprange", "clip-range", "epsilon"), ("ppo.loss.clip-range",)),
    "epsilon-high": ("ppo.loss.clip-range-high",),
    "delta": ("ppo.loss.dual-clip",),
    "importance-sampling-level": ("ppo.loss",),
    "scale-rewards": ("ppo.advantage",),
    "max-importance-weight": ("ppo.importance.max-weight", "ppo.importance truncated"),
    "num-iterations": ("ppo.epochs",),
    "use-bias-correction-kl": ("kl.by-ratio",),
    "lam": ("ppo.advantage.gae-lambda",),
    "use-peft": ("model.lora.rank 16",),
    "lora-r": ("model.lora.rank",),
    "lora-alpha": ("model.lora.alpha",),
    "lora-target-modules": ("model.lora.targets",),
    "load-in-4bit": ("model.lora.base nf4",),
    **dict.fromkeys(("ref-model", "ref-model-path"), ("reference.path",)),
    **dict.fromkeys(
        ("reward-funcs", "reward-model-path", "reward-model-name-or-path"),
        ("reward.sources", "reward"),
    ),
    "num-generations": ("sampling.num-samples",),
    **dict.fromkeys(("max-completion-length", "response-length"), ("sampling.max-new-tokens",)),
    "use-vllm": ("sampler vllm",),
    "report-to": ("track.to",),
    "run-name": ("track.name",),
    "log-completions": ("samples.every",),
    "num-completions-to-print": ("samples.num-completions",),
}
# Names that other libraries give to losses.
LOSSES_ELSEWHERE = {
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo_length_normalised",
    "ipo": "ipo_mean",
    "robust": "dpo_robust",
    "cdpo": "dpo_label_smoothed",
    "bt": "bradley_terry",
    "forward_kl": "dpo_forward_kl",
    "js_divergence": "dpo_jensen_shannon",
    "alpha_divergence": "dpo_alpha_divergence",
}
SHOWN = 10  # flags of a short help: the first of these that the command has
EXAMPLES = {
    "model.path": "Qwen/Qwen2.5-0.5B",
    "data.train": "train.jsonl",
    "run.dir": "runs/first",
    "reward.sources": "my_module:my_reward",
    "ppo.advantage": "grpo",
    "kl.coefficient": "0.05",
    "sampling.num-samples": "8",
    "sampling.max-new-tokens": "256",
    "loss": "",
    "loss.beta": "0.05",
    "optim.lr": "5e-6",
    "train.batch-size": "32",
    "train.epochs": "2",
    "data.eval": "held_out.jsonl",
    "model.lora.rank": "16",
    "data.max-length": "2048",
    "run.resume": "",
}
_TRUTH = ("true", "false", "yes", "no", "on", "off", "1", "0")


class Flag(NamedTuple):
    """A flag without its dashes: its type, its help text, and its default (MISSING: required)."""

    name: str
    kind: Any
    text: str
    default: Any


def flags_of(config: Any, owner: Any = None, prefix: str = "") -> Iterator[Flag]:
    """Yield the flags of a dataclass of settings; `owner` is an instance that holds defaults."""
    hints = get_type_hints(config)
    for entry in fields(config):
        name, default = f"{prefix}{entry.name.replace('_', '-')}", entry.default
        if owner is not None:
            default = getattr(owner, entry.name)
        elif entry.default_factory is not MISSING:
            default = entry.default_factory()
        default = default if is_given(default) else MISSING
        kind = type(default) if is_dataclass(default) else hints[entry.name]
        if is_dataclass(kind):
            yield from flags_of(kind, default if is_dataclass(default) else None, f"{name}.")
        else:
            text = entry.metadata.get("help") or field_docs(config).get(entry.name, "")
            yield Flag(name, kind, text, default)


def wrong_flags(config: type, words: Sequence[str], choices: Sequence[str]) -> dict[str, str]:
    """Return, for each flag that the command does not have or that has no value, what to type.

    Args:
        config: the command's settings.
        words: the command line's.
        choices: flags that are parsed elsewhere, such as `loss`.
    """
    known = {flag.name: flag for flag in flags_of(config)}
    for name, flag in list(known.items()):
        if flag.kind is bool:
            known[no(name)] = flag
    wrong: dict[str, str] = {}
    bare = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    if bare and "model.path" in known:
        places = [flag.name for flag in known.values() if flag.default is MISSING]
        typed = [f"--{name} {shlex.quote(word)}" for name, word in zip(places, bare, strict=False)]
        wrong[" ".join(bare)] = f"no flag before it, type {' '.join(typed)}"
    for word, following in itertools.pairwise([*words, "--"]):
        if re.match("-[a-z]{2}", word) and not word.startswith("-inf"):
            word = f"-{word}"  # tyro has no such flags
        if not word.startswith("--"):
            continue
        flag_name, _, value = word.partition("=")
        value = value or ("" if following.startswith("--") else following)
        name = flag_name.removeprefix("--").replace("_", "-")
        if name in choices:
            continue
        if name not in known:
            wrong[flag_name] = f"no such flag{instead(name, value, known, choices)}"
        elif known[name].kind is bool and value.lower() in _TRUTH:
            plain = known[name].name
            wrong[flag_name] = f"takes no value, type --{plain} or --{no(plain)}"
    return wrong


def no(name: str) -> str:
    """Return the flag that negates a boolean one: `run.no-resume`."""
    section, dot, key = name.rpartition(".")
    return f"{section}{dot}no-{key}"


def instead(name: str, value: str, known: Mapping[str, Flag], choices: Sequence[str]) -> str:
    """Return the end of a message: what to type instead of an unknown flag and its value."""
    section, _, last = name.rpartition(".")
    if section in choices:
        others = [f"--{each}" for each in known if each.startswith(f"{section}.")]
        return f", the chosen --{section} has {', '.join(others) or 'no parameters'}"
    aliases = ELSEWHERE.get(name) or ELSEWHERE.get(last, ())
    names = [*known, *choices]
    meant = next((each for each in aliases if each.split()[0] in names), None)
    meant = meant or next((each for each in known if each.startswith(f"{name}.")), None)
    meant = meant or nearest(name, names, 0.8)
    meant = meant or next((each for each in names if each.rpartition(".")[2] == last), None)
    if meant is None:
        ends = {each.rpartition(".")[2]: each for each in reversed(names)}
        meant = ends.get(nearest(last, ends, 0.75) or "")
    if meant is None:
        return ""
    if " " in meant or (meant in known and known[meant].kind is bool):
        value = ""
    return f", type --{meant} {shlex.quote(value) if value else ''}".rstrip()


def short_help(config: type, command: str, choices: Mapping[str, Mapping[str, type]]) -> str:
    """Return the help of the flags that matter most, each with an example."""
    known = {flag.name: flag for flag in flags_of(config)}
    for name, table in choices.items():
        if len(table) == 1:
            continue
        text = f"One of {', '.join(table)}."
        known[name] = Flag(name, str, text, next(iter(table)))
    required = [name for name, flag in known.items() if flag.default is MISSING]
    example = " ".join([command, *(f"--{name} {EXAMPLES.get(name, 'VALUE')}" for name in required)])
    lines = [
        f"usage: {command} FLAGS",
        "",
        *indented(example),
        "",
        wrapped(inspect.getdoc(config) or ""),
        "",
    ]
    for name in [name for name in EXAMPLES if name in known][:SHOWN]:
        flag = known[name]
        default = "required" if name in required else f"default: {flag.default}"
        told = flag.default is not None and flag.kind is not bool
        value = EXAMPLES[name] or (flag.default if told else "")
        lines += [f"--{name} {value}".rstrip(), *indented(flag.text + f" ({default})" * told)]
    lines += ["", wrapped(CONFIG_HELP), "", f"All flags: {command} --help-all"]
    return "\n".join(lines)


def indented(text: str) -> list[str]:
    """Return the lines of a paragraph that is filled to the terminal, indented."""
    width = shutil.get_terminal_size().columns
    space = "    "
    return textwrap.wrap(
        text, width, initial_indent=space, subsequent_indent=space, break_on_hyphens=False
    )


def wrapped(text: str) -> str:
    """Return paragraphs filled to the terminal; tyro would join lines that start with a letter."""
    width = shutil.get_terminal_size().columns
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return "\n\n".join(textwrap.fill(each, width, subsequent_indent="  ") for each in paragraphs)


def field_doc(section: type, name: str) -> str | None:
    """Return the docstring below a dataclass's field; None if it has none."""
    return field_docs(section).get(name)


@cache
def field_docs(section: type) -> dict[str, str]:
    """Return the docstring below each of a dataclass's fields, inherited ones included."""
    docs: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except (OSError, TypeError):  # built in, or made by `narrowed`
            continue
        assert isinstance(tree, ast.ClassDef)
        for statement, following in itertools.pairwise(tree.body):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                    value=ast.Constant(value=str(text))
                ):
                    docs[name] = " ".join(text.split())
    return docs
