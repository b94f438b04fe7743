"""Conversations to text through a chat template, split into prompt and response.

A prompt is what the template renders for generation (`add_generation_prompt`), so that training
continues exactly what a sampler is given, and an answer is what a sampler would have generated
behind it, its end included. Where a longer conversation holds each earlier answer like that, behind
its own prompt, one sequence trains all of them. Templates that render earlier turns differently
(Mistral's system prompt, Qwen3's reasoning, the end of gpt-oss) make one example of each answer.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fastalign.data.conversation import REASONING, Message

Template = Callable[[Sequence[Message], bool], str]
Piece = tuple[str, bool]  # text, and True if it is trained on


class TemplateError(ValueError):
    """Error for a conversation that the chat template refuses or does not render in order."""


@dataclass(frozen=True)
class Stops:
    """Texts of the special tokens that may end an answer.

    Attributes:
        ends: those at which a sampler stops.
        special: all of them.
    """

    ends: tuple[str, ...]
    special: tuple[str, ...]

    def end(self, text: str) -> int:
        """Return the length of a generated text up to its end, or -1 if it has none.

        The end is the first of `ends`, or else the last special token, of the special tokens and
        the white space with which the text closes.
        """
        last = first = -1
        while (text := text.rstrip()).endswith(self.special):
            token = max((token for token in self.special if text.endswith(token)), key=len)
            last = max(last, len(text))
            first = len(text) if token in self.ends else first
            text = text[: -len(token)]
        return last if first < 0 else first


def render_examples(
    template: Template,
    prompt: tuple[Message, ...],
    responses: Sequence[tuple[Message, ...]],
    stops: Stops,
) -> list[tuple[str, list[list[Piece]]]]:
    """Return examples: a prompt's text and the pieces of each response.

    `template` is called as (messages, add_generation_prompt) -> text; a response starts with an
    assistant's turn that is learned. It is one example, or, if it is the only response, one for
    each learned turn where the template renders earlier turns differently.

    Raises:
        TemplateError: if the template refuses the messages, leaves out a part of an answer, or
            renders earlier turns differently in one of several responses.
    """
    head = _prompt_text(template, prompt)
    found = [_examples(template, prompt, head, response, stops) for response in responses]
    if len(found) == 1:
        return [(text, [pieces]) for text, pieces in found[0]]
    if any(len(examples) > 1 for examples in found):
        problem = "a response of several answers is not supported in a comparison under it"
        raise TemplateError(f"the chat template renders earlier answers differently: {problem}")
    return [(head, [pieces for ((_, pieces),) in found])]


def ends_of_answers(template: Template) -> tuple[str, str]:
    """Return the text behind an assistant's last turn, and behind one that a user answers.

    Raises:
        TemplateError: if the template refuses such conversations.
    """
    turns = (Message("user", "."), Message("assistant", _mark(0)), Message("user", _mark(1)))
    last = template(turns[:2], False).rpartition(_mark(0))[2]
    return last, template(turns, False).rpartition(_mark(0))[2].partition(_mark(1))[0]


def is_learned(message: Message) -> bool:
    """Return whether a message of a response is trained on."""
    return message.role == "assistant" and message.learned


def _mark(index: int) -> str:
    """Return a content that no template changes: private-use characters around a number."""
    return f"\ue000{index}\ue001"


def _prompt_text(template: Template, turns: tuple[Message, ...]) -> str:
    """Return what a sampler continues; before the first message, what the template writes there."""
    if not turns:
        before, found, _ = template((Message("assistant", _mark(0)),), False).partition(_mark(0))
        if not found:
            raise TemplateError("the chat template does not show an assistant's content")
        return before
    text = template(turns, True)
    if turns[0].tools and text == template((turns[0].without("tools"), *turns[1:]), True):
        raise TemplateError("the chat template does not show tools")
    return text


def _examples(
    template: Template,
    prompt: tuple[Message, ...],
    head: str,
    response: tuple[Message, ...],
    stops: Stops,
) -> list[tuple[str, list[Piece]]]:
    """Return the examples of a response: one, or one for each learned turn."""
    turns = (*prompt, *response)
    found = []
    for index in range(len(prompt), len(turns)):
        if is_learned(turns[index]):
            before = turns[:index]
            text = head if index == len(prompt) else _prompt_text(template, before)
            found.append((text, _generated(template, before, text, turns[index])))
    text = "".join(found[-1])
    spans = []
    for place, (before_it, generated) in enumerate(found):
        end = stops.end(generated)
        answer = before_it + (generated if end < 0 else generated[:end])
        rest = text[len(answer) :]
        is_last = place == len(found) - 1
        # The end may be a token with which the next message begins, as in GLM's templates.
        if not text.startswith(answer) or not (
            is_last or end >= 0 or rest.lstrip().startswith(stops.ends)
        ):
            return [(before, [(generated, True)]) for before, generated in found]
        # White space goes with the answer: some tokens take in what follows them.
        after = len(rest) if is_last else len(rest) - len(rest.lstrip())
        spans.append((len(before_it), len(answer) + after))
    return [(head, list(_cut(text, len(head), spans)))]


def _generated(template: Template, turns: tuple[Message, ...], head: str, message: Message) -> str:
    """Return what a sampler generates behind `head`, which `turns` render, to give `message`."""
    whole = template((*turns, message), False)
    _check_shown(template, turns, message)
    if whole.startswith(head) and len(whole) > len(head) and _shows(whole, message.content):
        return whole[len(head) :]
    # The prompt of an answered conversation is another, or the template cuts the answer: take
    # what it writes before and behind a mark in the answer's place.
    marked = (*turns[:-1], replace(turns[-1], content=_mark(0))) if turns else turns
    prompt = template(marked, True).rpartition(_mark(0))[2] if turns else head
    answered = template((*marked, replace(message, content=_mark(1))), False)
    before, found, closing = answered.rpartition(_mark(1))
    if not found or (turns and _mark(0) not in before):
        raise TemplateError("the chat template does not show each message")
    before = before.rpartition(_mark(0))[2]
    contents = (message.content, message.content.strip())
    content = next((text for text in contents if whole.endswith(before + text + closing)), None)
    if content is not None or not _shows(whole, message.content):
        content = message.content if content is None else content
        if before.startswith(prompt):
            return before[len(prompt) :] + content + closing
        # A prompt that opens a block in which the model is to think, unlike finished answers.
        block = re.fullmatch(r"(.*?)\s*<(\w+)>\s*", prompt, re.DOTALL)
        if block and before.startswith(block[1]):
            tag, rest = block[2], before[len(block[1]) :]
            if not rest.strip() or re.fullmatch(rf"\s*<{tag}>\s*</{tag}>\s*", rest):
                return _closed(tag, content) + closing
    raise TemplateError("the chat template renders the prompt differently before an answer")


def _closed(tag: str, content: str) -> str:
    """Return an answer behind a prompt that opens a block, which the answer has to close."""
    if f"</{tag}>" in content:
        return re.sub(rf"\A\s*<{tag}>\s*", "", content)
    return f"\n</{tag}>\n\n{content}"  # an empty block, as Qwen3's own template writes it


def _shows(whole: str, content: str) -> bool:
    """Return whether a rendering has an answer's content, white space apart."""
    return content.strip() in whole or "".join(content.split()) in "".join(whole.split())


def _check_shown(template: Template, turns: tuple[Message, ...], message: Message) -> None:
    """Check that the template shows a message's tool calls and reasoning.

    Raises:
        TemplateError: if not, since they would be left out of training.
    """
    if not message.extra:
        return
    keys = json.loads(message.extra)
    calls = keys.get("tool_calls", [])
    marks = [_mark(2 + number) for number in range(len(calls))]
    for call, mark in zip(calls, marks, strict=True):
        call["function"]["name"] = mark
    if REASONING in keys:
        keys[REASONING] = _mark(1)
    text = template((*turns, replace(message, extra=json.dumps(keys))), False)
    if not all(mark in text for mark in marks):
        raise TemplateError("the chat template does not show every one of tool_calls")
    if REASONING in keys and _mark(1) not in text:
        raise TemplateError(f"the chat template does not show {REASONING}")


def _cut(text: str, start: int, spans: list[tuple[int, int]]) -> Iterator[Piece]:
    """Yield the pieces of a text behind `start`; those of `spans` are trained on."""
    for first, last in spans:
        yield from ((text[start:first], False),) if first > start else ()
        yield text[first:last], True
        start = last
