"""Rows to checked examples: the required values of their columns."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastalign.data.columns import UNSUPPORTED, Kind, missing, present, unpaired_label
from fastalign.data.conversation import (
    Message,
    check_order,
    content,
    messages,
    read_tools,
    with_tools,
)
from fastalign.data.readers.row import DataFault, Row, show, show_names

Content = str | tuple[Message, ...]
# Anthropic's hh-rlhf writes whole dialogues as text; a reply starts after this mark.
_REPLY_MARK = "\n\nAssistant:"
_VOTE_SIDES = ("a", "b", "tie")
_SIDES = ("chosen", "rejected", "response_a", "response_b")


@dataclass(frozen=True)
class SFTExample:
    """A demonstration; for `text` and `messages` rows `prompt` is None, and all is completion.

    In a conversation every assistant turn of `completion` is trained on, and nothing else.
    """

    prompt: Content | None
    completion: Content
    source: str
    form: str


@dataclass(frozen=True)
class UnpairedExample(SFTExample):
    """An answer that was found good (`desirable`) or bad."""

    desirable: bool


@dataclass(frozen=True)
class Votes:
    """Counts of a comparison's votes; their sum is above 0."""

    a: float
    b: float
    tie: float

    def swapped(self) -> "Votes":
        """Return the votes with the two responses swapped."""
        return Votes(self.b, self.a, self.tie)

    def shares(self) -> tuple[float, float, float]:
        """Return the shares of the votes for the first response, the second, and a tie."""
        total = self.a + self.b + self.tie
        return self.a / total, self.b / total, self.tie / total


@dataclass(frozen=True)
class PreferenceExample:
    """A comparison; in a tie, `chosen` is response a and `rejected` is response b.

    `votes.a` counts the votes for `chosen`, whichever response it was in the file.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    tie: bool
    margin: float | None
    votes: Votes | None
    source: str
    form: str


@dataclass(frozen=True)
class PromptExample:
    """A prompt to answer; `columns` are those that rewards take, as JSON, or empty."""

    prompt: Content
    source: str
    form: str
    columns: str = ""


Example = SFTExample | PreferenceExample | PromptExample


def parse(row: Row, kind: Kind) -> Example:
    """Check a row and return its example.

    Raises:
        DataFault: if a column is missing, null, of the wrong type, empty or contradictory.
    """
    for name in UNSUPPORTED:
        if row.values.get(name):
            raise DataFault(row.where, "this column is not supported; remove it", name)
    if kind == "sft":
        return _with_tools(row, _sft(row))
    if kind == "unpaired" and not present(row, _SIDES):
        return _with_tools(row, _unpaired(row))
    return _with_tools(row, _prompt(row) if kind == "prompt" else _preference(row))


def _with_tools(row: Row, example: Example) -> Example:
    """Return the example with the tools of the row's column, which its first message holds."""
    if not row.values.get("tools"):
        return example
    tools = read_tools(row.values["tools"], lambda text: DataFault(row.where, text, "tools"))
    if isinstance(example, SFTExample) and example.prompt is None:
        whole = example.completion
        if not isinstance(whole, str):
            return replace(example, completion=with_tools(whole, tools))
    elif example.prompt is not None and not isinstance(example.prompt, str):
        return replace(example, prompt=with_tools(example.prompt, tools))
    raise DataFault(row.where, "only a conversation can have tools", "tools")


def _sft(row: Row) -> SFTExample:
    found = present(row, ("text", "messages", "completion"))
    if not found:
        raise missing(row, "sft", ("text", "messages", "completion"))
    if len(found) > 1:
        raise DataFault(row.where, f"expected one of the columns {' and '.join(found)}, got both")
    column = found[0]
    if column == "messages":
        turns = messages(row, column)
        check_order(row.where, column, turns)
        return SFTExample(None, turns, row.where, "messages")
    if column == "text":
        whole = content(row, column)
        if not isinstance(whole, str):
            raise DataFault(row.where, "expected text; a conversation is named messages", column)
        return SFTExample(None, whole, row.where, "text")
    if "prompt" not in row.values:
        raise missing(row, "sft", ("prompt",))
    if isinstance(row.values.get("label"), bool):
        problem = (
            "prompt, completion and a boolean label are unpaired preferences, not SFT rows; "
            "fastalign kto trains on them"
        )
        raise DataFault(row.where, problem, "label")
    prompt, completion = content(row, "prompt"), content(row, column)
    _check_pair(row, prompt, {column: completion})
    return SFTExample(prompt, completion, row.where, f"prompt + completion, {style(prompt)}")


def _unpaired(row: Row) -> UnpairedExample:
    for name in ("prompt", "completion"):
        if name not in row.values:
            raise missing(row, "unpaired", (name,))
    if "label" not in row.values:
        raise missing(row, "unpaired", ("label",))
    desirable = unpaired_label(row)
    if desirable is None:
        got = show(row.values["label"])
        raise DataFault(row.where, f"expected true or false, got {got}", "label")
    prompt, completion = content(row, "prompt"), content(row, "completion")
    _check_pair(row, prompt, {"completion": completion})
    form = f"prompt + completion, label {str(desirable).lower()}, {style(prompt)}"
    return UnpairedExample(prompt, completion, row.where, form, desirable)


def _prompt(row: Row) -> PromptExample:
    if "prompt" not in row.values:
        raise missing(row, "prompt", ("prompt",))
    prompt = content(row, "prompt")
    _check_pair(row, prompt, {})
    return PromptExample(prompt, row.where, f"prompt, {style(prompt)}")


def _preference(row: Row) -> PreferenceExample:
    judged = present(row, ("chosen", "rejected"))
    compared = present(row, ("response_a", "response_b"))
    if judged and compared:
        raise DataFault(row.where, f"expected {judged[0]} or {compared[0]}, got both")
    names = ("response_a", "response_b") if compared else ("chosen", "rejected")
    for name in names:
        if name not in row.values:
            raise missing(row, "preference", names)
    first, second = content(row, names[0]), content(row, names[1])
    if isinstance(first, str) != isinstance(second, str):
        problem = f"{names[0]} is {style(first)} but this is {style(second)}"
        raise DataFault(row.where, problem, names[1])
    if first == second:
        raise DataFault(row.where, f"identical to {names[0]}", names[1])
    prompt, first, second, explicit = _with_prompt(row, names, first, second)
    _check_pair(row, prompt, {names[0]: first, names[1]: second})
    label = _label(row, compared=bool(compared))
    # Votes name responses a and b, and a row with chosen and rejected does not say which is which.
    votes = row_votes(row) if compared else None
    if label == "b":
        first, second = second, first
        votes = votes and votes.swapped()
    form = " + ".join((("prompt",) if explicit else ()) + names) + f", {style(prompt)}"
    tie, margin = label == "tie", _margin(row)
    return PreferenceExample(prompt, first, second, tie, margin, votes, row.where, form)


def _with_prompt(
    row: Row, names: tuple[str, str], first: Content, second: Content
) -> tuple[Content, Content, Content, bool]:
    """Return `(prompt, first, second, explicit)`; an implicit prompt is the common beginning."""
    explicit = "prompt" in row.values
    if explicit:
        prompt = content(row, "prompt")
        # Some exports repeat, beside the full conversations, the first question as plain text.
        repeated = isinstance(prompt, str) and _asks(first, prompt) and _asks(second, prompt)
        if not repeated:
            return prompt, first, second, True
    if isinstance(first, str) and isinstance(second, str):
        return (*split_text(row.where, names[1], first, second), explicit)
    assert isinstance(first, tuple)
    assert isinstance(second, tuple)
    return (*split_messages(row.where, names[1], first, second), explicit)


def _asks(side: Content, question: str) -> bool:
    if isinstance(side, str):
        return False
    users = [message.content for message in side if message.role == "user"]
    return bool(users) and users[0].strip() == question.strip()


def _check_pair(row: Row, prompt: Content, responses: Mapping[str, Content]) -> None:
    """Check that prompt and responses are all plain text, or all conversations in a valid order."""
    for column, response in responses.items():
        if isinstance(prompt, str) != isinstance(response, str):
            problem = f"the prompt is {style(prompt)} but this is {style(response)}"
            raise DataFault(row.where, problem, column)
    if isinstance(prompt, str):
        return
    check_order(row.where, "prompt", prompt, last=("user", "tool"))
    for column, response in responses.items():
        assert isinstance(response, tuple)
        check_order(row.where, column, response, before=prompt)


def _label(row: Row, compared: bool) -> str:
    value = row.values.get("label")
    if not compared:
        if value == "tie":
            problem = "a tie is written with response_a and response_b, not chosen and rejected"
            raise DataFault(row.where, problem, "label")
        return "a"
    if "label" not in row.values:
        raise missing(row, "preference", ("label",))
    if not isinstance(value, str) or value not in ("a", "b", "tie"):
        raise DataFault(row.where, f"expected 'a', 'b' or 'tie', got {show(value)}", "label")
    return value


def _margin(row: Row) -> float | None:
    value = row.values.get("margin")
    if row.textual and isinstance(value, str):
        try:
            value = float(value) if value.strip() else None
        except ValueError:
            raise DataFault(row.where, f"expected a number, got {show(value)}", "margin") from None
    return None if value is None else _finite(row, "margin", value)


def _finite(
    row: Row,
    column: str,
    value: object,
    *,
    name: str = "",
    what: str = "number",
    least: float = -1e30,
) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataFault(row.where, f"{name}expected a {what}, got {show(value)}", column)
    if not least <= value <= 1e30:
        bound = f" of at least {least:g}" if least >= 0 else ""
        problem = f"{name}expected a finite {what}{bound}, got {show(value)}"
        raise DataFault(row.where, problem, column)
    return float(value)


def style(value: Content) -> str:
    """Return whether it is plain text or a conversation, in words."""
    return "plain text" if isinstance(value, str) else "a conversation"


def split_text(where: str, column: str, first: str, second: str) -> tuple[str, str, str]:
    r"""Return `(prompt, first response, second response)` of two texts with a common beginning.

    The cut is after the last common `\n\nAssistant:`, else before the first word that differs, so
    that both responses start with a whole word.

    Raises:
        DataFault: if there is no common beginning, or nothing follows it on one side.
    """
    common = os.path.commonprefix([first, second])  # noqa: RUF071 (characters are meant)
    mark = common.rfind(_REPLY_MARK)
    if mark >= 0:
        cut = mark + len(_REPLY_MARK)
    else:
        cut = max((index for index, letter in enumerate(common) if letter.isspace()), default=0)
    if not first[:cut].strip():
        problem = "no prompt column, and the two sides have no common beginning to serve as one"
        raise DataFault(where, problem, column)
    if not first[cut:].strip() or not second[cut:].strip():
        raise DataFault(where, "nothing follows what the two sides have in common", column)
    return first[:cut], first[cut:], second[cut:]


def split_messages(
    where: str, column: str, first: tuple[Message, ...], second: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Return `(prompt, first response, second response)`; the prompt is all common messages.

    Raises:
        DataFault: if no message is common, or nothing follows them on one side.
    """
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    if count == 0:
        problem = "no prompt column, and the two sides have no first message in common"
        raise DataFault(where, problem, column)
    if count == len(first) or count == len(second):
        raise DataFault(where, "nothing follows what the two sides have in common", column)
    return first[:count], first[count:], second[count:]


def row_votes(row: Row) -> Votes | None:
    """Return the row's votes, or None if it has none; a missing `tie` counts 0.

    Raises:
        DataFault: if they are not an object of counts, a count is below 0 or not finite, or all
            counts are 0.
    """
    value = row.values.get("votes")
    if value is None or (row.textual and value == ""):
        return None
    if not isinstance(value, dict):
        remedy = "; CSV cannot hold objects, use .jsonl" if row.textual else ""
        problem = f"expected an object of counts {{a, b, tie}}, got {show(value)}{remedy}"
        raise DataFault(row.where, problem, "votes")
    named = {key for key, count in value.items() if count is not None}
    if not {"a", "b"} <= named <= set(_VOTE_SIDES):
        problem = f"expected the keys a, b and tie, got {show_names(value)}"
        raise DataFault(row.where, problem, "votes")
    given = [0 if value.get(side) is None else value[side] for side in _VOTE_SIDES]
    counts = [
        _finite(row, "votes", count, name=f"{side}: ", what="count", least=0)
        for side, count in zip(_VOTE_SIDES, given, strict=True)
    ]
    if not sum(counts) > 0:
        raise DataFault(row.where, "expected at least one vote, got none", "votes")
    return Votes(*counts)
