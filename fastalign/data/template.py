"""Conversations to text through a chat template, cut at the seams between prompt and response.

The prompt is what the template renders for generation, so that training continues exactly what a
sampler is given. A template whose generation prompt is not how it renders an answered conversation
(one that adds a `<think>` tag which finished answers lack) is cut where the answer's content
starts. Either way the cut does not depend on the answer: both sides of a pair share one prompt.
"""

from collections.abc import Callable, Sequence

from fastalign.data.conversation import Message

Template = Callable[[Sequence[Message], bool], str]
Piece = tuple[str, bool]  # text, and whether the loss looks at it


class TemplateError(ValueError):
    """A conversation that the chat template refuses or does not render in order."""


def render_responses(
    template: Template, prompt: tuple[Message, ...], responses: Sequence[tuple[Message, ...]]
) -> tuple[str, list[list[Piece]]]:
    """The prompt's text, and for each response its pieces: assistant turns are learned.

    Args:
        template: `(messages, add_generation_prompt) -> text`.
        prompt: the messages before the first assistant turn to learn.
        responses: each starts with an assistant turn and ends with one.

    Raises:
        TemplateError: the template refuses the messages, or rewrites earlier turns beyond
            recognition.
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


def _mark(index: int) -> str:
    """A content that no template changes: private-use characters around a number."""
    return f"\ue000{index}\ue001"


def _head_of_answers(template: Template, prompt: tuple[Message, ...]) -> str:
    """What an answered conversation has before the answer's content."""
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
    """Character spans of the assistant's turns in `text`, each with its end-of-turn marks."""
    if len(response) == 1:
        return [(start, len(text))]
    spans = []
    for index, message in enumerate(response):
        if message.role != "assistant":
            continue
        turns = (*prompt, *response[:index])
        head = text[:start] if index == 0 else template(turns, True)
        whole = template((*turns, message), False)
        if not text.startswith(head) or not text.startswith(whole):
            # Templates that drop the reasoning of earlier turns render a shorter conversation
            # differently; cut those by their skeleton.
            return _spans_by_skeleton(template, (*prompt, *response), len(prompt), text, start)
        spans.append((len(head), len(whole)))
    return spans


def _spans_by_skeleton(
    template: Template, turns: tuple[Message, ...], num_prompt: int, text: str, start: int
) -> list[tuple[int, int]]:
    """The same spans from a rendering whose contents are marks, checked against `text`."""
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
        if index >= num_prompt and turns[index].role == "assistant":
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
    """What a rendering of marked messages has before, between and after the marks."""
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
