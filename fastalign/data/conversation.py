"""Conversations of messages `{role, content}`: reading them from rows and checking their order."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastalign.data.readers.row import DataFault, Row, shorten, show, show_names

ROLES = ("system", "developer", "user", "assistant", "tool")
# Roles that may follow each role; None is the beginning.
_NEXT: dict[str | None, tuple[str, ...]] = {
    None: ("system", "developer", "user", "assistant"),
    "system": ("user", "assistant"),
    "developer": ("user", "assistant"),
    "user": ("user", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
# Parts of a message that are not supported, and would be lost if ignored.
_UNSUPPORTED_KEYS = (
    *("function_call", "image", "images", "audio", "audios", "video", "videos"),
    *("prefix", "partial"),
)
REASONING = "reasoning_content"
# With other tools' names of it; a template is given the first that it reads.
REASONING_KEYS = (REASONING, "thinking", "reasoning")
# Keys that a template is given as they are, and the role that has them.
_EXTRA_KEYS = {"name": "tool", "tool_call_id": "tool"}
# Other tools' names of whether a message is learned: OpenAI, Mistral, axolotl, ms-swift, verl.
_LEARNED_KEYS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
# Names that other tools may give to a message's share in the loss, such as `train_detail`.
_LIKE_LEARNED_KEYS = re.compile("train|loss|weight|mask|learn|ignore", re.IGNORECASE)
_HANDLED_KEYS = {"role", "content", "tool_calls", "tools", *REASONING_KEYS}
_HANDLED_KEYS |= {*_UNSUPPORTED_KEYS, *_LEARNED_KEYS}
_SURROGATE = re.compile("[\ud800-\udfff]")
_PRINTED_LIST = re.compile(r"\s*\[\s*\{.*['\"]role['\"]\s*:.*\}\s*\]\s*", re.DOTALL)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of ROLES.
        content: its text.
        learned: False if a key of the message, such as `weight`, keeps it from being trained on.
        extra: a JSON object of its other keys: `tool_calls`, `reasoning_content`, those of a tool's
            answer, and, in the first message, the conversation's `tools`.
    """

    role: str
    content: str
    learned: bool = field(default=True, compare=False, repr=False)  # repr is fingerprinted
    extra: str = field(default="", repr=False)

    @property
    def tools(self) -> Any:
        """The tools that a conversation's first message holds, or None."""
        return json.loads(self.extra).get("tools") if self.extra else None

    def without(self, key: str) -> "Message":
        """Return the message without one of its other keys."""
        return _with_extra(self, {k: v for k, v in json.loads(self.extra).items() if k != key})


def _with_extra(message: Message, keys: dict[str, Any]) -> Message:
    return replace(message, extra=json.dumps(keys, ensure_ascii=False) if keys else "")


def with_tools(turns: tuple[Message, ...], tools: list[Any]) -> tuple[Message, ...]:
    """Return a conversation whose first message holds its tools."""
    keys = json.loads(turns[0].extra or "{}") | {"tools": tools}
    return (_with_extra(turns[0], keys), *turns[1:])


def content_as_json(content: str | Sequence[Message]) -> Any:
    """Return plain text unchanged, and a conversation as a list of {role, content, ...}."""
    if isinstance(content, str):
        return content
    return [
        {"role": turn.role, "content": turn.content} | json.loads(turn.extra or "{}")
        for turn in content
    ]


def json_as_content(value: Any) -> str | tuple[Message, ...]:
    """Return what `content_as_json` was given."""
    if isinstance(value, str):
        return value
    found = []
    for turn in value:
        others = {key: part for key, part in turn.items() if key not in ("role", "content")}
        found.append(_with_extra(Message(turn["role"], turn["content"]), others))
    return tuple(found)


def prompt_key(prompt: Any) -> str:
    """Return a prompt as one text; a conversation as its turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    lines = []
    for turn in prompt:
        others = {key: part for key, part in turn.items() if key not in ("role", "content")}
        more = f" {json.dumps(others, ensure_ascii=False)}" if others else ""
        lines.append(f"[{turn['role']}] {turn['content']}{more}")
    return "\n".join(lines)


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
    if "role" not in item or ("content" not in item and not item.get("tool_calls")):
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
    extra = _extra(item, index, fault)
    text = _text_of_parts(item.get("content"), fault)
    # A tool may return nothing, and a call needs no words.
    may_be_empty = item["role"] == "tool" or "tool_calls" in extra
    if not may_be_empty or (text is not None and str(text).strip()):
        check_text(row.where, column, text, name)
    return _with_extra(Message(item["role"], text or "", _learned(item, fault)), extra)


def _text_of_parts(value: Any, fault: Callable[[str], DataFault]) -> Any:
    """Return a message's content, with the text of a list of parts as lines; other parts fail."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            got = show(part if kind in (None, "text") else kind)
            raise fault(f"only parts of type 'text' are supported, got {got}")
        others = [key for key in part if key not in ("type", "text") and part[key] is not None]
        if others:
            raise fault(f"{shorten(others[0])} of a part is not supported")
        texts.append(part["text"])
    return "\n".join(texts)


def _extra(item: dict[str, Any], index: int, fault: Callable[[str], DataFault]) -> dict[str, Any]:
    """Return the keys beside role and content that a chat template is given."""
    found: dict[str, Any] = {}
    if item.get("tools"):
        if index != 1 or item["role"] == "assistant":
            raise fault("tools belong to the first message, which is not the assistant's")
        found["tools"] = read_tools(item["tools"], fault)
    reasons = {key: item[key] for key in REASONING_KEYS if item.get(key)}
    for key, value in reasons.items():
        if item["role"] != "assistant" or not isinstance(value, str):
            raise fault(f"{key}: expected a text of the assistant, got {show(value)}")
    if len(set(reasons.values())) > 1:
        raise fault(f"{' and '.join(reasons)} differ")
    if reasons:
        found[REASONING] = next(iter(reasons.values()))
    if item.get("tool_calls"):
        if item["role"] != "assistant" or not isinstance(item["tool_calls"], list):
            got = show(item["tool_calls"])
            raise fault(f"tool_calls: expected a list of the assistant's calls, got {got}")
        found["tool_calls"] = [_tool_call(call, fault) for call in item["tool_calls"]]
    for key, role in _EXTRA_KEYS.items():
        if item.get(key) is not None and item["role"] == role:
            if not isinstance(item[key], str):
                raise fault(f"{key}: expected text, got {show(item[key])}")
            found[key] = item[key]
    return dict(_as_json(found, ", ".join(found), fault))


def _tool_call(call: Any, fault: Callable[[str], DataFault]) -> dict[str, Any]:
    """Return a call as {"type": "function", "function": {"name", "arguments": {...}}, ...}."""
    if isinstance(call, dict) and "function" not in call:
        kept = {key: call[key] for key in ("name", "arguments") if key in call}
        call = {key: call[key] for key in call if key not in kept} | {"function": kept}
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise fault(f"tool_calls: expected a function with name and arguments, got {show(call)}")
    arguments = _from_json(function.get("arguments") or {})
    if not isinstance(arguments, dict):
        raise fault(f"tool_calls: expected an object as arguments, got {show(arguments)}")
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _from_json(value: Any) -> Any:
    """Return what a JSON text holds; anything else unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _as_json(value: Any, key: str, fault: Callable[[str], DataFault]) -> Any:
    """Return a value that is JSON of valid text; Parquet's may hold dates or bytes."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise fault(f"{key}: expected what JSON can hold: {error}"[:300]) from None
    if _SURROGATE.search(text) or "\\u0000" in text:
        raise fault(f"{key}: NUL or half a surrogate pair")
    return value


def read_tools(value: Any, fault: Callable[[str], DataFault]) -> list[Any]:
    """Return descriptions of tools, given as a list of objects or as the JSON text of one."""
    tools = _from_json(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise fault(f"tools: expected a list of objects, got {show(value)}")
    return list(_as_json(tools, "tools", fault))


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
        if key not in _EXTRA_KEYS or item.get("role") != _EXTRA_KEYS[key]
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
        expected = _NEXT[previous] if index > 1 or not before else ("assistant",)
        if message.role not in expected:
            after = f" after {previous!r}" if previous else " at the beginning"
            names = " or ".join(repr(role) for role in expected)
            problem = f"message {index}: expected role {names}{after}, got {message.role!r}"
            raise DataFault(where, problem, column)
        previous = message.role
    if previous not in last:
        names = " or ".join(repr(role) for role in last)
        raise DataFault(where, f"expected the last message from {names}, got {previous!r}", column)
