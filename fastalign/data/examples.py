"""Rows to checked examples: what their columns must hold."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fastalign.data.columns import UNSUPPORTED, Kind, missing, present
from fastalign.data.conversation import Message, check_order, content, messages
from fastalign.data.implicit_prompt import split_messages, split_text
from fastalign.data.readers.row import DataFault, Row, show
from fastalign.data.votes import Votes, votes_of

Content = str | tuple[Message, ...]


@dataclass(frozen=True)
class SFTExample:
    """A demonstration. `prompt` is None for `text` and `messages` rows, whose whole is completion.

    Of a conversation every assistant turn of `completion` is learned, and nothing else.
    """

    prompt: Content | None
    completion: Content
    source: str
    form: str


@dataclass(frozen=True)
class PreferenceExample:
    """A comparison. Of a tie, `chosen` is response a and `rejected` is response b.

    `votes.a` are those for `chosen`, whichever response that was in the file.
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
    """A prompt to be answered."""

    prompt: Content
    source: str
    form: str


Example = SFTExample | PreferenceExample | PromptExample


def parse(row: Row, kind: Kind) -> Example:
    """The checked example of a row.

    Raises:
        DataFault: a column that is missing, null, of the wrong type, empty, contradictory.
    """
    for name in UNSUPPORTED:
        if row.values.get(name):
            raise DataFault(row.where, "this column is not supported; remove it", name)
    if kind == "sft":
        return _sft(row)
    return _preference(row) if kind == "preference" else _prompt(row)


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
        problem = "prompt, completion and a boolean label are unpaired preferences, not SFT rows"
        raise DataFault(row.where, problem, "label")
    prompt, completion = content(row, "prompt"), content(row, column)
    _check_pair(row, prompt, {column: completion})
    return SFTExample(prompt, completion, row.where, f"prompt + completion, {_style(prompt)}")


def _prompt(row: Row) -> PromptExample:
    if "prompt" not in row.values:
        raise missing(row, "prompt", ("prompt",))
    prompt = content(row, "prompt")
    _check_pair(row, prompt, {})
    return PromptExample(prompt, row.where, f"prompt, {_style(prompt)}")


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
        problem = f"{names[0]} is {_style(first)} but this is {_style(second)}"
        raise DataFault(row.where, problem, names[1])
    if first == second:
        raise DataFault(row.where, f"identical to {names[0]}", names[1])
    prompt, first, second, explicit = _with_prompt(row, names, first, second)
    _check_pair(row, prompt, {names[0]: first, names[1]: second})
    label = _label(row, compared=bool(compared))
    # Of chosen and rejected nobody can say which was a: such a row's votes are not looked at.
    votes = votes_of(row) if compared else None
    if label == "b":
        first, second = second, first
        votes = votes and votes.swapped()
    form = " + ".join((("prompt",) if explicit else ()) + names) + f", {_style(prompt)}"
    tie, margin = label == "tie", _margin(row)
    return PreferenceExample(prompt, first, second, tie, margin, votes, row.where, form)


def _with_prompt(
    row: Row, names: tuple[str, str], first: Content, second: Content
) -> tuple[Content, Content, Content, bool]:
    """`(prompt, first, second, explicit)`; an implicit prompt is what both sides begin with."""
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
    """Prompt and responses are all plain text, or all conversations in a proper order."""
    for column, response in responses.items():
        if isinstance(prompt, str) != isinstance(response, str):
            problem = f"the prompt is {_style(prompt)} but this is {_style(response)}"
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
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataFault(row.where, f"expected a number, got {show(value)}", "margin")
    if abs(value) > 1e30 or not math.isfinite(value):
        raise DataFault(row.where, f"expected a finite number, got {show(value)}", "margin")
    return float(value)


def _style(value: Content) -> str:
    return "plain text" if isinstance(value, str) else "a conversation"
