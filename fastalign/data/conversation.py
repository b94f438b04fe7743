"""Conversations of messages `{role, content}`: reading them from rows and checking their order."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastalign.data.readers.row import DataFault, Row, shorten, show, show_names

ROLES = ("system", "developer", "user", "assistant", "tool")
# Roles that may follow each role; None is the beginning.
_NEXT: dict[str | None, tuple[str, ...]] = {
    None: ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
# Parts of a message that are not supported, and would be lost if ignored.
_UNSUPPORTED_KEYS = (
    *("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"),
    *("image", "images", "audio", "audios", "video", "videos", "prefix", "partial"),
)
# Other tools' names of whether a message is learned: OpenAI, Mistral, axolotl, ms-swift, verl.
_LEARNED_KEYS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
# Names that other tools may give to a message's share in the loss, such as `train_detail`.
_LIKE_LEARNED_KEYS = re.compile("train|loss|weight|mask|learn|ignore", re.IGNORECASE)
_HANDLED_KEYS = {"role", "content", *_UNSUPPORTED_KEYS, *_LEARNED_KEYS}
_SURROGATE = re.compile("[\ud800-\udfff]")
_PRINTED_LIST = re.compile(r"\s*\[\s*\{.*['\"]role['\"]\s*:.*\}\s*\]\s*", re.DOTALL)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of ROLES.
        content: its text.
        learned: False if a key of the message, such as `weight`, keeps it from being trained on.
    """

    role: str
    content: str
    learned: bool = field(default=True, compare=False, repr=False)  # repr is fingerprinted


def content_as_json(content: str | Sequence[Message]) -> Any:
    """Return plain text unchanged, and a conversation as a list of {role, content}."""
    if isinstance(content, str):
        return content
    return [{"role": turn.role, "content": turn.content} for turn in content]


def prompt_key(prompt: Any) -> str:
    """Return a prompt as one text; a conversation as its turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"[{turn['role']}] {turn['content']}" for turn in prompt)


def check_text(where: str, column: str, value: object, name: str = "") -> str:
    """Check that a value is text that can be trained on, and return it.

    Raises:
        DataFault: if it is not text, is blank, or has NUL characters or half a surrogate pair.
    """
    if not isinstance(value, str):
        raise DataFault(where, f"{name}expected text, got {show(value)}", column)
    if not value.strip():
        raise DataFault(
            where,
            f"{name}expected text, got {'white space' if value else 'an empty string'}",
            column,
        )
    lone = _SURROGATE.search(value)
    if lone:
        code = f"U+{ord(lone[0]):04X}"
        raise DataFault(
            where, f"{name}half a surrogate pair ({code}) at character {lone.start() + 1}", column
        )
    if "\0" in value:
        place = value.index("\0") + 1
        raise DataFault(where, f"{name}NUL at character {place}: binary data?", column)
    return value


def content(row: Row, column: str) -> str | tuple[Message, ...]:
    """Return a column's plain text or messages.

    Raises:
        DataFault: if it is neither, or a list of messages printed as text.
    """
    value = row.values.get(column)
    if isinstance(value, list):
        return messages(row, column)
    if not isinstance(value, str):
        problem = f"expected text or a list of messages, got {show(value)}"
        raise DataFault(row.where, problem, column)
    if _PRINTED_LIST.fullmatch(value):
        remedy = "; CSV cannot hold lists, use .jsonl" if row.textual else ""
        raise DataFault(
            row.where, f"a list of messages written as text{remedy}: {show(value)}", column
        )
    return check_text(row.where, column, value)


def messages(row: Row, column: str) -> tuple[Message, ...]:
    """Return a column's messages; `check_order` checks their order.

    Raises:
        DataFault: if it is not a list, is empty, or has a faulty message, given by its number.
    """
    value = row.values.get(column)
    if not isinstance(value, list):
        remedy = " (CSV cannot hold lists: use .jsonl)" if row.textual else ""
        problem = f"expected a list of messages, got {show(value)}{remedy}"
        raise DataFault(row.where, problem, column)
    if not value:
        raise DataFault(row.where, "expected a list of messages, got an empty list", column)
    return tuple(_message(row, column, index, item) for index, item in enumerate(value, start=1))


def _message(row: Row, column: str, index: int, item: object) -> Message:
    name = f"message {index}: "

    def fault(problem: str) -> DataFault:
        return DataFault(row.where, name + problem, column)

    if not isinstance(item, dict):
        raise fault(f"expected an object with role and content, got {show(item)}")
    if "role" not in item or "content" not in item:
        hint = " (rename from and value)" if {"from", "value"} <= set(item) else ""
        raise fault(f"expected the keys role and content, got {show_names(item)}{hint}")
    if not isinstance(item["role"], str) or item["role"] not in ROLES:
        raise fault(f"expected a role of {', '.join(ROLES)}, got {show(item['role'])}")
    for key in _UNSUPPORTED_KEYS:
        if item.get(key):
            raise fault(f"{key} is not supported")
    for key in unknown_keys([item]):
        if _LIKE_LEARNED_KEYS.search(key):
            known = ", ".join(_LEARNED_KEYS)
            raise fault(f"{shorten(key)} is not supported; of such keys only {known} are")
    if isinstance(item["content"], list):
        raise fault("expected text, got a list of parts (only text is supported)")
    text = check_text(row.where, column, item["content"], name)
    return Message(item["role"], text, _learned(item, fault))


def _learned(item: dict[str, object], fault: Callable[[str], DataFault]) -> bool:
    """Return whether the keys of a message let it be trained on; they must agree.

    Raises:
        DataFault: if they do not, ask for a part, or for the text of another role.
    """
    found = {key: item[key] for key in _LEARNED_KEYS if item.get(key) is not None}
    for key, value in found.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise fault(f"{key}: expected 0, 1, true or false, got {show(value)}")
    if len({bool(value) for value in found.values()}) > 1:
        raise fault(f"the keys {' and '.join(found)} contradict each other")
    if item["role"] != "assistant" and any(found.values()):
        raise fault(f"{next(iter(found))}: only messages of the assistant are learned")
    return all(found.values())


def unknown_keys(value: object) -> list[str]:
    """Return the keys of messages that nothing uses, one for each message that has it."""
    found = value if isinstance(value, list) else []
    return [
        str(key)
        for item in found
        if isinstance(item, dict)
        for key, part in item.items()
        if key not in _HANDLED_KEYS and part is not None
    ]


def check_order(
    where: str,
    column: str,
    turns: Sequence[Message],
    *,
    before: Sequence[Message] = (),
    last: tuple[str, ...] = ("assistant",),
) -> None:
    """Check that each turn may follow the previous one, and that the last has a role of `last`.

    Raises:
        DataFault: if not; gives the message by its number within the column.
    """
    previous = before[-1].role if before else None
    for index, message in enumerate(turns, start=1):
        expected = _NEXT[previous]
        if message.role not in expected:
            after = f" after {previous!r}" if previous else " at the beginning"
            names = " or ".join(repr(role) for role in expected)
            problem = f"message {index}: expected role {names}{after}, got {message.role!r}"
            raise DataFault(where, problem, column)
        previous = message.role
    if previous not in last:
        names = " or ".join(repr(role) for role in last)
        raise DataFault(where, f"expected the last message from {names}, got {previous!r}", column)
