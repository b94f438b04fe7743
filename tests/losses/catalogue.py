"""Every loss and option with its peers, its use and its test: what `docs/losses.md` is made of.

Names, flags, defaults and first lines come from the code, formulas and papers from
`docs/equations.md`. A line of `catalogue.txt` adds which peers have it, when to use it, and the
test with its hand-worked number.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

from fastalign.cli.flags import Flag, flags_of
from fastalign.trainers import (
    ADVANTAGES,
    IMPORTANCE,
    KL_PENALTIES,
    LOSS_MEANS,
    LOSSES,
    POLICY_LOSSES,
    REWARD_LOSSES,
    JSDLoss,
    KTOLoss,
    SFTLoss,
)

ROOT = Path(__file__).parents[2]
DOCS, EQUATIONS = ROOT / "docs/losses.md", ROOT / "docs/equations.md"


class Entry(NamedTuple):
    """A row.

    Attributes:
        flag: what is typed; `--loss dpo` is the choice `dpo` of `--loss`.
        equation: first cell of its row in `docs/equations.md`, or a name in that cell.
        peers: libraries that have it, under which name.
        use: when to take it.
        test: `file::function` below `tests`.
    """

    flag: str
    equation: str
    peers: str
    use: str
    test: str


def read_sections() -> dict[str, tuple[str, list[Entry]]]:
    """Return the entries of `catalogue.txt` by section, each with the commands that have it."""
    found: dict[str, tuple[str, list[Entry]]] = {}
    for line in (Path(__file__).with_name("catalogue.txt")).read_text("utf-8").splitlines():
        if line.startswith("# "):
            title, _, commands = line.removeprefix("# ").partition(": ")
            entries: list[Entry] = []
            found[title] = (commands, entries)
        elif line:
            entries.append(Entry(*line.split(" ; ")))
    return found


SECTIONS = read_sections()
# Choices that have to have a row, by the flag that takes them.
CHOICES: dict[str, Mapping[str, type[Any]]] = {
    "--loss": {**LOSSES, **REWARD_LOSSES},
    "--ppo.loss": POLICY_LOSSES,
    "--ppo.mean": LOSS_MEANS,
    "--ppo.importance": IMPORTANCE,
    "--ppo.advantage": ADVANTAGES,
    "--kl": KL_PENALTIES,
}


def equation(name: str) -> tuple[str, str]:
    """Return formula and source of a row of `docs/equations.md`.

    Raises:
        ValueError: if no row has the name.
    """
    text = EQUATIONS.read_text(encoding="utf-8")
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        begins = (f"`{name}` (", *((name, f"`{name}") if " " in name else ()))
        if cells and (cells[0] == f"`{name}`" or cells[0].startswith(begins)):
            return cells[1], cells[2] if len(cells) > 2 else ""
    raise ValueError(f"{EQUATIONS}: no row of {name}")


def parameters(entry: Entry) -> str:
    """Return the flags of a choice with their defaults."""
    flag, _, name = entry.flag.partition(" ")
    if flag == "fastalign":
        kind = KTOLoss if name == "kto" else SFTLoss
        return ", ".join(f"`--loss.{each.name}` {each.default}" for each in flags_of(kind))
    if not flag.startswith("--"):
        return ""
    if flag == "--loss.jsd":
        return ", ".join(shown(flag, each) for each in flags_of(JSDLoss))
    if name:
        table = CHOICES[flag]
        return ", ".join(shown(flag, each) for each in flags_of(table[name]))
    kinds = [SFTLoss] if entry.equation in ("cross_entropy", "z_loss") else kinds_of(flag)
    owner = next(kind for kind in kinds if field_of(flag) in names_of(kind))
    default = next(each.default for each in flags_of(owner) if each.name == field_of(flag))
    return f"default {default}"


def shown(flag: str, each: Flag) -> str:
    """Return a flag with its default."""
    default = "required" if each.default is MISSING else each.default
    return f"`{flag}.{each.name}` {default}"


def field_of(flag: str) -> str:
    """Return the last part of a dotted flag."""
    return flag.rpartition(".")[2]


def kinds_of(flag: str) -> list[type[Any]]:
    """Return the dataclasses that a dotted flag may belong to."""
    return list(CHOICES[flag.rpartition(".")[0]].values())


def names_of(kind: type[Any]) -> list[str]:
    """Return a dataclass's flags."""
    return [each.name.replace("_", "-") for each in fields(kind)]


def link_of(test: str) -> str:
    """Return a test as the table shows it: the function, linked to its file."""
    file, _, function = test.partition("::")
    return f"[{function}](../tests/{file})"


def page() -> str:
    """Return the text of `docs/losses.md`."""
    lines = [
        "# Losses and options",
        "",
        "Made from the code and [equations.md](equations.md) by `python -m tests.losses`; a test",
        "holds it up to date. Each formula is one function of `fastalign.losses`, computed without",
        "the (tokens, vocabulary) logits by every command and drop-in, and each row names the test",
        "of its hand-worked number. `tests/losses/test_peers.py` compares those that TRL or Liger",
        "has with theirs, values and gradients, in float64.",
    ]
    for title, (commands, entries) in SECTIONS.items():
        lines += ["", f"## {title}", "", f"{commands}.", ""]
        lines.append("| flag | formula | source | peers | use it for | parameters | test |")
        lines.append("|---|---|---|---|---|---|---|")
        for entry in entries:
            formula, source = equation(entry.equation)
            cells = (
                *(f"`{entry.flag}`", formula, source, entry.peers, entry.use),
                *(parameters(entry), link_of(entry.test)),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
