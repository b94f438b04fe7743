"""The known columns of rows, and the message when one is missing.

The names are TRL's; `response_a`, `response_b`, `label` (`a`, `b` or `tie`) and `votes` are ours.
"""

from collections.abc import Mapping
from typing import Literal

from fastalign.data.readers.row import DataFault, Row, show_names

Kind = Literal["sft", "preference", "prompt"]
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
    "prompt": "prompt",
}
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


def row_kind(row: Row) -> Kind:
    """Return the kind of a row by its columns: `preference` before `sft` before `prompt`.

    Raises:
        DataFault: if its columns are those of no kind.
    """
    names = row.values
    if any(name in names for name in ("chosen", "rejected", "response_a", "response_b")):
        return "preference"
    if any(name in names for name in ("completion", "messages", "text")):
        return "sft"
    if "prompt" in names:
        return "prompt"
    expected = "; or ".join(_EXPECTED.values())
    found = f"found {show_names(list(names))}"
    raise DataFault(row.where, f"expected the columns {expected}; {found}{_rename(names)}")


def unused_columns(row: Row, kind: Kind) -> list[str]:
    """Return the columns of a row of this kind that no example has; known ones unless null."""
    if kind == "prompt":
        used = {"prompt"}
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
