"""Conversations to text through a chat template, split into prompt and response.

The prompt is what the template renders for generation, so that training continues exactly what a
sampler is given. Some templates render an answered conversation with another beginning than the
generation prompt (they add a `<think>` tag that finished answers lack): those are split where the
answer's content starts. Either way the split does not depend on the answer, and both sides of a
pair share one prompt.
"""

from collections.abc import Callable, Sequence

from fastalign.data.conversation import Message

Template = Callable[[Sequence[Message], bool], str]
Piece = tuple[str, bool]  # text, and True if it is trained on


class TemplateError(ValueError):
    """Error for a conversation that the chat template refuses or does not render in order."""


def render_responses(
    template: Template, prompt: tuple[Message, ...], responses: Sequence[tuple[Message, ...]]
) -> tuple[str, list[list[Piece]]]:
    """Return the prompt's text, and the pieces of each response; assistant turns are trained on.

    `template` is called as (messages, add_generation_prompt) -> text; responses start and end with
    an assistant turn.

    Raises:
        TemplateError: if the template refuses the messages, or rewrites earlier turns so that they
            cannot be found.
    """
    head = template(prompt, True)
    texts = [template((*prompt, *response), False) for response in responses]
    if not all(text.startswith(head) for text in texts):
        head = _head_of_answers(template, prompt)
    if not all(text.startswith(head) and len(text) > len(head) for text in texts):
        raise TemplateError("the chat template renders the prompt differently before an answer")
    pieces = []
    for response, text in zip(responses, texts, strict=True):
        spans = _learned_spans(template, prompt, response, text, len(head))
        pieces.append(_cut(text, len(head), spans))
    return head, pieces


def end_of_answer(template: Template) -> str:
    """Return the text behind an assistant's last turn; raise TemplateError if it is refused."""
    turns = (Message("user", "."), Message("assistant", _mark(0)))
    return _literals(template(turns, False), range(1))[-1]


def is_learned(message: Message) -> bool:
    """Return whether a message of a response is trained on."""
    return message.role == "assistant" and message.learned


def _mark(index: int) -> str:
    """Return a content that no template changes: private-use characters around a number."""
    return f"\ue000{index}\ue001"


def _head_of_answers(template: Template, prompt: tuple[Message, ...]) -> str:
    """Return the text of an answered conversation before the answer's content."""
    text = template((*prompt, Message("assistant", _mark(0))), False)
    before, found, _ = text.rpartition(_mark(0))
    if not found:
        raise TemplateError("the chat template does not show an assistant's content")
    return before


def _learned_spans(
    template: Template,
    prompt: tuple[Message, ...],
    response: tuple[Message, ...],
    text: str,
    start: int,
) -> list[tuple[int, int]]:
    """Return the character spans of the assistant's turns in `text`, end-of-turn marks included."""
    if len(response) == 1:
        return [(start, len(text))]
    spans = []
    for index, message in enumerate(response):
        if not is_learned(message):
            continue
        turns = (*prompt, *response[:index])
        head = text[:start] if index == 0 else template(turns, True)
        whole = template((*turns, message), False)
        if not text.startswith(head) or not text.startswith(whole):
            # Templates that drop the reasoning of earlier turns render a shorter conversation
            # differently, so the spans come from a rendering with marks as contents.
            return _spans_by_marks(template, (*prompt, *response), len(prompt), text, start)
        spans.append((len(head), len(whole)))
    return spans


def _spans_by_marks(
    template: Template, turns: tuple[Message, ...], num_prompt: int, text: str, start: int
) -> list[tuple[int, int]]:
    """Return the same spans from a rendering with marks as contents, checked against `text`."""
    marked = tuple(Message(turn.role, _mark(index)) for index, turn in enumerate(turns))
    literals = _literals(template(marked, False), range(len(turns)))
    for contents in ([turn.content for turn in turns], [turn.content.strip() for turn in turns]):
        parts = [literals[0]]
        for content, literal in zip(contents, literals[1:], strict=True):
            parts += [content, literal]
        if "".join(parts) == text:
            break
    else:
        raise TemplateError("the chat template rewrites earlier turns: cannot tell them apart")
    spans = []
    position = 0
    for index, content in enumerate(contents):
        position += len(literals[index])
        if index >= num_prompt and is_learned(turns[index]):
            generated = _literals(template(marked[:index], True), range(index))[-1]
            inside = literals[index].startswith(generated)
            before = len(literals[index]) - len(generated) if inside else 0
            closing = _literals(template(marked[: index + 1], False), range(index + 1))[-1]
            after = len(closing) if literals[index + 1].startswith(closing) else 0
            spans.append((position - before, position + len(content) + after))
        position += len(content)
    spans[0] = (start, spans[0][1])
    return spans


def _literals(text: str, indices: range) -> list[str]:
    """Return the text of a rendering before, between and after the marks."""
    literals = []
    for index in indices:
        before, found, text = text.partition(_mark(index))
        if not found:
            raise TemplateError("the chat template leaves out or reorders messages")
        literals.append(before)
    return [*literals, text]


def _cut(text: str, start: int, spans: list[tuple[int, int]]) -> list[Piece]:
    pieces: list[Piece] = []
    position = start
    for first, last in spans:
        pieces += [(text[position:first], False), (text[first:last], True)]
        position = last
    pieces.append((text[position:], False))
    return [piece for piece in pieces if piece[0]]
