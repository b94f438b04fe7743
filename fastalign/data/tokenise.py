"""Checked examples to token ids: one BOS, a clean prompt boundary, and a trained EOS.

The rules, which are the same for training, sampling and evaluation:

- The prompt is tokenised alone, as for a sampler, and is the same for all its responses. A
  response's tokens are those of the whole text after the prompt's tokens; if a token would cross
  the boundary, the response is tokenised alone, and the row is counted.
- Exactly one BOS, if the tokenizer adds one: a text or a chat template that already begins with it
  gets no second one.
- A plain response ends in EOS, added if it is missing. A conversation ends as its template renders
  it; EOS is added only if that has no end-of-turn token. White space after it is left out.
- Loss masks follow from lengths alone; no id is ever compared with the pad token.
"""

from collections.abc import Sequence
from functools import cached_property

from fastalign.batch.packed import Group
from fastalign.data.conversation import Message
from fastalign.data.examples import Content, PreferenceExample, PromptExample, SFTExample
from fastalign.data.readers.row import DataFault
from fastalign.data.template import Piece, Template, TemplateError, is_learned, render_responses
from fastalign.data.tokenizer import (
    Tokenizer,
    chat_template,
    eos_token_ids,
    place_of_end,
    special_ids,
)

# A prefix after which tokens are those of a continuation.
_BEFORE = "\n"


class Encoder:
    """The tokenisation of examples by the rules of this module.

    Raises:
        ValueError: if the tokenizer has no EOS.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path}: has no EOS token, so no model that uses it "
                "can learn to stop"
            )
        self.eos_token_id = int(tokenizer.eos_token_id)
        added = tokenizer("a")["input_ids"]
        bos = tokenizer.bos_token_id
        self._bos = [int(bos)] if bos is not None and added[:1] == [bos] else []
        ends = eos_token_ids(tokenizer, tokenizer.name_or_path)
        self._stops = special_ids(tokenizer).union(ends)

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens added."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def continuation_ids(self, text: str) -> list[int]:
        """Return the tokens of a continuation, without the space that some tokenizers prepend."""
        before, whole = self.ids(_BEFORE), self.ids(_BEFORE + text)
        return whole[len(before) :] if whole[: len(before)] == before else self.ids(text)

    def prompt(self, example: PromptExample) -> list[int]:
        """Return the token ids that a sampler continues.

        Raises:
            DataFault: if the template refuses the row, or there is no token.
        """
        if isinstance(example.prompt, str):
            return self._prompt_ids(example.source, example.prompt)
        try:
            text = self._render(example.prompt, True)
        except TemplateError as error:
            raise DataFault(example.source, str(error), "prompt") from None
        return self._prompt_ids(example.source, text)

    def row(self, example: SFTExample | PreferenceExample) -> tuple[Group, bool]:
        """Return a demonstration (one response) or a comparison (chosen or a first) as a group.

        The second value is True if a token would have crossed from the prompt into a response.

        Raises:
            DataFault: if the template refuses the row, a side has no token, or both sides of a
                comparison have the same tokens.
        """
        return self._sft(example) if isinstance(example, SFTExample) else self._pair(example)

    def _sft(self, example: SFTExample) -> tuple[Group, bool]:
        prompt, completion = example.prompt, example.completion
        if isinstance(completion, str):
            assert prompt is None or isinstance(prompt, str)
            return self._plain(example.source, prompt or "", [completion])
        if prompt is None:
            prompt = ()
        first = next((i for i, turn in enumerate(completion) if is_learned(turn)), None)
        if first is None:
            raise DataFault(example.source, "no message of the assistant is to be learned")
        prompt, completion = (*prompt, *completion[:first]), completion[first:]
        assert not isinstance(prompt, str)
        return self._conversation(example.source, prompt, [completion])

    def _pair(self, example: PreferenceExample) -> tuple[Group, bool]:
        sides: list[Content] = [example.chosen, example.rejected]
        if isinstance(example.prompt, str):
            texts = [str(side) for side in sides]
            group, crosses = self._plain(example.source, example.prompt, texts)
        else:
            turns = [side for side in sides if not isinstance(side, str)]
            if not all(is_learned(m) for side in turns for m in side if m.role == "assistant"):
                problem = "a message that is not to be learned is not supported in a comparison"
                raise DataFault(example.source, problem)
            group, crosses = self._conversation(example.source, example.prompt, turns)
        if group.response_ids[0] == group.response_ids[1]:
            raise DataFault(example.source, "the two responses have the same tokens")
        return group, crosses

    def answers(self, source: str, prompt: Content, completions: Sequence[str]) -> Group:
        """Return a prompt with its sampled answers, each ended as a response is in training.

        Raises:
            DataFault: if the template refuses the prompt, or a side has no token.
        """
        if not prompt:
            raise DataFault(source, "expected a prompt, got an empty one", "prompt")
        if isinstance(prompt, str):
            return self._plain(source, prompt, list(completions))[0]
        turns: list[tuple[Message, ...]] = [(Message("assistant", t),) for t in completions]
        return self._conversation(source, prompt, turns)[0]

    @cached_property
    def _render(self) -> Template:
        return chat_template(self._tokenizer)

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self._bos)] == self._bos else [*self._bos, *ids]

    def _prompt_ids(self, source: str, text: str) -> list[int]:
        ids = self._with_bos(self.ids(text))
        if not ids:
            raise DataFault(source, "the prompt has no token, and the tokenizer adds no BOS")
        return ids

    def _after(self, head_text: str, head: list[int], text: str) -> tuple[list[int], bool]:
        """Return the tokens of `text` after `head_text`; True if one would cross the boundary."""
        whole = self.ids(head_text + text)
        if whole[: len(head)] == head:
            return whole[len(head) :], False
        return self.continuation_ids(text), True

    def _plain(self, source: str, prompt: str, responses: list[str]) -> tuple[Group, bool]:
        head = self.ids(prompt)
        ids, crossings = [], []
        for text in responses:
            response, crosses = self._after(prompt, head, text)
            if response[-1:] != [self.eos_token_id]:
                response = [*response, self.eos_token_id]
            ids.append(response)
            crossings.append(crosses)
        if not prompt:
            # BOS is the prompt of a text; if the tokenizer adds none, the first token is.
            whole = self._with_bos(ids[0])
            if len(whole) < 2:
                raise DataFault(source, "the text has a single token, and none to predict it from")
            return Group(whole[:1], [whole[1:]]), False
        return Group(self._prompt_ids(source, prompt), ids), any(crossings)

    def _conversation(
        self, source: str, prompt: tuple[Message, ...], responses: list[tuple[Message, ...]]
    ) -> tuple[Group, bool]:
        try:
            head_text, rendered = render_responses(self._render, prompt, responses)
        except TemplateError as error:
            raise DataFault(source, str(error)) from None
        head = self.ids(head_text)
        ids, masks, crossings = [], [], []
        for pieces in rendered:
            response, mask, crosses = self._pieces(head_text, head, pieces)
            if not any(mask):
                raise DataFault(source, "the chat template leaves no assistant token to learn")
            ids.append(response)
            masks.append(mask)
            crossings.append(crosses)
        group = Group(self._prompt_ids(source, head_text), ids, masks)
        return group, any(crossings)

    def _pieces(
        self, head_text: str, head: list[int], pieces: list[Piece]
    ) -> tuple[list[int], list[bool], bool]:
        first, learned = pieces[0]
        ids, crosses = self._after(head_text, head, first)
        mask = [learned] * len(ids)
        for text, learned in pieces[1:]:
            more = self.continuation_ids(text)
            ids, mask = ids + more, mask + [learned] * len(more)
        end = place_of_end(self._tokenizer, ids, self._stops)
        if end >= 0:
            return ids[: end + 1], mask[: end + 1], crosses
        last_learned = max(i for i, used in enumerate(mask) if used) if any(mask) else -1
        # Without an end-of-turn token the model would never learn to stop: add EOS.
        return (
            [*ids[: last_learned + 1], self.eos_token_id],
            [*mask[: last_learned + 1], True],
            crosses,
        )
