"""The known columns of rows, the message when one is missing, and columns for reward functions.

The names are TRL's, also `label` (true or false) of an unpaired row; `response_a`, `response_b`,
their `label` (`a`, `b` or `tie`) and `votes` are ours.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from typing import Literal

from fastalign.data.readers.row import DataFault, Row, show_names

Kind = Literal["sft", "preference", "unpaired", "prompt"]
COLUMNS = frozenset(
    [
        *("text", "messages", "prompt", "completion", "chosen", "rejected"),
        *("response_a", "response_b", "label", "votes", "margin"),
        *("tools", "chat_template_kwargs"),
        *("images", "image", "audios", "audio", "videos", "video"),
    ]
)
_EXPECTED: dict[str, str] = {
    "sft": "text, messages, or prompt and completion",
    "preference": "(prompt,) chosen and rejected, or (prompt,) response_a, response_b and label",
    "unpaired": "prompt, completion and label (true or false), or those of a comparison",
    "prompt": "prompt",
}
# Words of a label in files that hold text alone.
LABEL_WORDS = {"true": True, "false": False, "1": True, "0": False}
UNSUPPORTED = (
    *("images", "image", "audios", "audio", "videos", "video"),
    "chat_template_kwargs",
)
_OTHER_NAMES = {
    **dict.fromkeys(("instruction", "question", "query", "input"), "prompt"),
    **dict.fromkeys(("output", "response", "answer"), "completion"),
    **dict.fromkeys(("conversation", "conversations"), "messages"),
    **dict.fromkeys(("accepted", "preferred", "winner"), "chosen"),
    **{"loser": "rejected", "content": "text"},
}
# A reward function is given these as its first two arguments.
_PROMPT_AND_ANSWER = frozenset(("prompt", "completion", "prompts", "completions"))


@dataclass(frozen=True)
class RowColumns:
    """Columns of a prompt's row that reward functions take; none by default.

    Attributes:
        required: every row has to have them.
        optional: rows may have them.
        every: whether all other columns are taken, too.
        takers: the functions that take a required or optional column, for messages.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    every: bool = False
    takers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self.required or self.optional or self.every)

    def names_to_read(self) -> Collection[str] | None:
        """Return the columns to read of a table: these and the known ones; None for all."""
        return None if self.every else COLUMNS | {*self.required, *self.optional}

    def taken(self, row: Row) -> dict[str, object]:
        """Return the values of a row that are taken, in the order of their names.

        Raises:
            DataFault: if the row lacks a required column.
        """
        for name in self.required:
            if name not in row.values:
                raise DataFault(row.where, f"missing; {self.takers[name]} takes it", name)
        names = row.values.keys() if self.every else {*self.required, *self.optional}
        return {
            name: row.values[name]
            for name in sorted(names & row.values.keys())
            if name not in _PROMPT_AND_ANSWER
        }

    def packed(self, row: Row) -> str:
        """Return the values of a row that are taken as JSON; dates and decimals become text.

        Raises:
            DataFault: if the row lacks a required column, or a value is not one that JSON has.
        """
        parts = []
        for name, value in self.taken(row).items():
            try:
                parts.append(f"{json.dumps(name)}: {json.dumps(value, default=as_text)}")
            except TypeError as error:
                problem = f"a value that JSON cannot hold: {error}"
                raise DataFault(row.where, problem, name) from None
        return f"{{{', '.join(parts)}}}"


def as_lists(rows: Sequence[Mapping[str, object]]) -> dict[str, list[object]]:
    """Return a list of each column that a row has, with None for rows that lack it."""
    names = sorted({name for row in rows for name in row})
    return {name: [row.get(name) for row in rows] for name in names}


def as_text(value: object) -> str:
    """Return a date, a time or a decimal as text; raise TypeError for another value."""
    if isinstance(value, date | time | Decimal):
        return str(value)
    raise TypeError(f"expected a value that JSON has, got one of type {type(value).__name__}")


def row_kind(row: Row) -> Kind:
    """Return the kind of a row by its columns: `preference` before `sft` before `prompt`.

    A completion with a label that is true or false is `unpaired`.

    Raises:
        DataFault: if its columns are those of no kind.
    """
    names = row.values
    if any(name in names for name in ("chosen", "rejected", "response_a", "response_b")):
        return "preference"
    if "completion" in names and unpaired_label(row) is not None:
        return "unpaired"
    if any(name in names for name in ("completion", "messages", "text")):
        return "sft"
    if "prompt" in names:
        return "prompt"
    expected = "; or ".join(_EXPECTED.values())
    found = f"found {show_names(list(names))}"
    raise DataFault(row.where, f"expected the columns {expected}; {found}{_rename(names)}")


def unpaired_label(row: Row) -> bool | None:
    """Return the label of an unpaired row, or None if it is neither true nor false."""
    value = row.values.get("label")
    if row.textual and isinstance(value, str):
        return LABEL_WORDS.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def unused_columns(row: Row, kind: Kind) -> list[str]:
    """Return the columns of a row of this kind that no example has; known ones unless null."""
    if kind == "prompt":
        used = {"prompt"}
    elif kind == "unpaired" and present(row, ("completion",)):
        used = {"prompt", "completion", "label"}
    elif kind == "sft":
        paired = row.values.get("completion") is not None
        used = {"prompt", "completion"} if paired else {"text", "messages"}
    else:
        used = {"prompt", "chosen", "rejected", "margin"}
        if present(row, ("response_a", "response_b")):
            used |= {"response_a", "response_b", "label", "votes"}
    names = row.values.keys() - used - {"tools"}
    return [n for n in names if n not in COLUMNS or row.values[n] not in (None, "")]


def present(row: Row, names: tuple[str, ...]) -> list[str]:
    """Return those of the columns that exist and are not null."""
    return [name for name in names if row.values.get(name) is not None]


def missing(row: Row, kind: str, names: tuple[str, ...]) -> DataFault:
    """Return the fault of a row without a column that its kind needs."""
    for name in names:
        if name in row.values and row.values[name] is None:
            return DataFault(row.where, "expected text or a list of messages, got null", name)
    absent = next((name for name in names if name not in row.values), names[0])
    found = f"found {show_names(list(row.values))}{_rename(row.values)}"
    return DataFault(row.where, f"missing; {kind} rows have {_EXPECTED[kind]}; {found}", absent)


def _rename(names: Mapping[str, object]) -> str:
    """Suggest a name if a column exists under another spelling."""
    for name in names:
        plain = name.strip().lower()
        meant = plain if plain in COLUMNS else _OTHER_NAMES.get(plain)
        if meant and meant not in names:
            return f"; rename {name!r} to {meant!r}?" if len(name) < 40 else ""
    return ""
