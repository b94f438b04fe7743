"""Checked examples to token ids: one BOS, a clean prompt boundary, and a trained EOS.

The rules, which are the same for training, sampling and evaluation:

- The prompt is tokenised alone, as for a sampler, and is the same for all its responses. A
  response's tokens are those of the whole text after the prompt's tokens; if a token would cross
  the boundary, the response is tokenised alone, and the row is counted.
- Exactly one BOS, if the tokenizer adds one: a text or a chat template that already begins with it
  gets no second one.
- A plain response ends in EOS, added if it is missing. An answer of a conversation ends at the
  first token at which a sampler stops, which is learned; if its template writes none, it is added.
- A demonstration is one example, or one for each of its answers if its template renders an earlier
  answer in another way than a sampler gives it (see `template`).
- Loss masks follow from lengths alone; no id is ever compared with the pad token.
"""

from collections.abc import Generator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

from fastalign.batch.packed import Group
from fastalign.data.conversation import Message
from fastalign.data.examples import Content, PreferenceExample, PromptExample, SFTExample
from fastalign.data.readers.row import DataFault
from fastalign.data.template import (
    Piece,
    Stops,
    Template,
    TemplateError,
    is_learned,
    render_examples,
)
from fastalign.data.tokenizer import (
    Tokenizer,
    backend_as_it_is,
    chat_template,
    eos_token_ids,
    is_plain,
    last_word,
    missing_end,
    place_of_end,
    special_ids,
    splits_at_spaces,
    template_times,
    texts_of_stops,
)

# A prefix after which tokens are those of a continuation.
_BEFORE = "\n"

T = TypeVar("T")
# A group, and True if a token would have crossed from the prompt into a response.
Encoded = tuple[Group, bool]
# The tokenisation of one row: it yields texts, is sent the token ids of each, and returns a result.
Work = Generator[list[str], list[list[int]], T]


class Encoder:
    """The tokenisation of examples by the rules of this module.

    Raises:
        ValueError: if the tokenizer has no EOS.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._is_plain = is_plain(tokenizer)
        self._splits_at_spaces = self._is_plain and splits_at_spaces(tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path}: has no EOS token, so no model that uses it "
                "can learn to stop"
            )
        self.eos_token_id = int(tokenizer.eos_token_id)
        added = tokenizer("a")["input_ids"]
        bos = tokenizer.bos_token_id
        self._bos = [int(bos)] if bos is not None and added[:1] == [bos] else []
        self._ends = eos_token_ids(tokenizer, tokenizer.name_or_path)
        self._special = special_ids(tokenizer).union(self._ends)

    @property
    def num_ids(self) -> int:
        """One more than the highest token id."""
        return 1 + max(self._tokenizer.get_vocab().values())

    def identity(self) -> Sequence[Any] | None:
        """Return all that the tokens of a text depend on; None if code of its own decides them."""
        tokenizer: Any = self._tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or type(tokenizer).__module__.startswith("transformers_modules"):
            return None
        return (
            *(type(tokenizer).__qualname__, backend.to_str(), self._bos, sorted(self._special)),
            self._ends,
            *(str(tokenizer.chat_template), template_times(tokenizer)),
            *(tokenizer.special_tokens_map, getattr(tokenizer, "split_special_tokens", None)),
        )

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return self._tokenizer.decode(ids)

    def _all_ids(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of each text, without special tokens added."""
        if not texts:
            return []
        if self._is_plain and (backend := backend_as_it_is(self._tokenizer)) is not None:
            batch = backend.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in batch]
        options = {"return_attention_mask": False, "return_token_type_ids": False}
        found = self._tokenizer(texts, add_special_tokens=False, **options)
        ids: list[list[int]] = found["input_ids"]
        return ids

    def _results(self, works: Sequence[Work[T]]) -> list[T | DataFault]:
        """Run works side by side, and encode what they ask for together; a fault is a result."""
        results: list[Any] = [None] * len(works)
        answers: list[Any] = [None] * len(works)
        running = list(range(len(works)))
        while running:
            asked: list[tuple[int, int]] = []
            texts: list[str] = []
            for number in running:
                try:
                    wanted = works[number].send(answers[number])
                except StopIteration as end:
                    results[number] = end.value
                except DataFault as fault:
                    results[number] = fault
                else:
                    asked.append((number, len(wanted)))
                    texts += wanted
            ids = iter(self._all_ids(texts))
            for number, count in asked:
                answers[number] = list(islice(ids, count))
            running = [number for number, _ in asked]
        return results

    def _result(self, work: Work[T]) -> T:
        (result,) = self._results([work])
        if isinstance(result, DataFault):
            raise result
        return result

    def prompts(self, examples: Sequence[PromptExample]) -> list[list[int] | DataFault]:
        """Return the token ids that a sampler continues.

        In place of a prompt there is its fault if the template refuses it, or it has no token.
        """
        return self._results([self._prompt(example) for example in examples])

    def prompt(self, example: PromptExample) -> list[int]:
        """Return one of `prompts`; raise its DataFault if it has one."""
        return self._result(self._prompt(example))

    def _prompt(self, example: PromptExample) -> Work[list[int]]:
        text = example.prompt
        if not isinstance(text, str):
            try:
                text = self._render(text, True)
            except TemplateError as error:
                raise DataFault(example.source, str(error), "prompt") from None
        (ids,) = yield [text]
        return self._prompt_ids(example.source, ids)

    def rows(
        self, examples: Sequence[SFTExample | PreferenceExample]
    ) -> list[list[Encoded] | DataFault]:
        """Return demonstrations (one response) or comparisons (chosen or a first) as groups.

        A demonstration may be several. In place of a row there is its fault if the template refuses
        it, a side has no token, or both sides of a comparison have the same tokens.
        """
        return self._results(
            [self._sft(row) if isinstance(row, SFTExample) else self._pair(row) for row in examples]
        )

    def row(self, example: SFTExample | PreferenceExample) -> list[Encoded]:
        """Return one of `rows`; raise its DataFault if it has one."""
        (result,) = self.rows([example])
        if isinstance(result, DataFault):
            raise result
        return result

    def _sft(self, example: SFTExample) -> Work[list[Encoded]]:
        prompt, completion = example.prompt, example.completion
        if isinstance(completion, str):
            assert prompt is None or isinstance(prompt, str)
            return [(yield from self._plain(example.source, prompt or "", [completion]))]
        if prompt is None:
            prompt = ()
        first = next((i for i, turn in enumerate(completion) if is_learned(turn)), None)
        if first is None:
            raise DataFault(example.source, "no message of the assistant is to be learned")
        assert not isinstance(prompt, str)
        prompt, completion = (*prompt, *completion[:first]), completion[first:]
        while not is_learned(completion[-1]):
            completion = completion[:-1]
        return (yield from self._conversation(example.source, prompt, [completion]))

    def _pair(self, example: PreferenceExample) -> Work[list[Encoded]]:
        sides: list[Content] = [example.chosen, example.rejected]
        if isinstance(example.prompt, str):
            texts = [str(side) for side in sides]
            group, crosses = yield from self._plain(example.source, example.prompt, texts)
        else:
            turns = [side for side in sides if not isinstance(side, str)]
            if not all(is_learned(m) for side in turns for m in side if m.role == "assistant"):
                problem = "a message that is not to be learned is not supported in a comparison"
                raise DataFault(example.source, problem)
            found = yield from self._conversation(example.source, example.prompt, turns)
            ((group, crosses),) = found
        if group.response_ids[0] == group.response_ids[1]:
            raise DataFault(example.source, "the two responses have the same tokens")
        return [(group, crosses)]

    def answers(self, source: str, prompt: Content, completions: Sequence[str]) -> Group:
        """Return a prompt with its sampled answers, each ended as a response is in training.

        Raises:
            DataFault: if the template refuses the prompt, or a side has no token.
        """
        if not prompt:
            raise DataFault(source, "expected a prompt, got an empty one", "prompt")
        if isinstance(prompt, str):
            return self._result(self._plain(source, prompt, list(completions)))[0]
        turns: list[tuple[Message, ...]] = [(Message("assistant", t),) for t in completions]
        ((group, _),) = self._result(self._conversation(source, prompt, turns))
        return group

    @cached_property
    def _render(self) -> Template:
        return chat_template(self._tokenizer)

    @cached_property
    def _stops(self) -> Stops:
        return texts_of_stops(self._tokenizer, self._ends, self._special)

    @cached_property
    def _missing_end(self) -> int:
        return missing_end(self._tokenizer, self._ends)

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self._bos)] == self._bos else [*self._bos, *ids]

    def _prompt_ids(self, source: str, ids: list[int]) -> list[int]:
        ids = self._with_bos(ids)
        if not ids:
            raise DataFault(source, "the prompt has no token, and the tokenizer adds no BOS")
        return ids

    def _continuations(self, texts: list[str]) -> Work[list[list[int]]]:
        """Return the tokens of texts that go on, without the space some tokenizers prepend."""
        if not texts:
            return []
        before, *wholes = yield [_BEFORE, *(_BEFORE + text for text in texts)]
        begin = [whole[: len(before)] == before for whole in wholes]
        alone = iter((yield [text for text, found in zip(texts, begin, strict=True) if not found]))
        return [
            whole[len(before) :] if found else next(alone)
            for whole, found in zip(wholes, begin, strict=True)
        ]

    def _with_texts(self, prompt: str, texts: list[str]) -> Work[tuple[list[int], list[list[int]]]]:
        """Return the tokens of a prompt, and those of the prompt with each text behind it.

        What is before a word of the prompt is encoded once, if its tokens are the same whatever
        follows.
        """
        cut = last_word(prompt) if self._splits_at_spaces else 0
        rest = prompt[cut:]
        before, *behind = yield [prompt[:cut], rest, *(rest + text for text in texts)]
        head, *wholes = (before + ids for ids in behind)
        return head, wholes

    def _after(self, head: list[int], whole: list[int], text: str) -> Work[tuple[list[int], bool]]:
        """Return the tokens of `text` after those of a prompt; True if one crosses the boundary.

        `head` are the prompt's tokens, `whole` those of the prompt with the text.
        """
        if whole[: len(head)] == head:
            return whole[len(head) :], False
        (ids,) = yield from self._continuations([text])
        return ids, True

    def _plain(self, source: str, prompt: str, responses: list[str]) -> Work[tuple[Group, bool]]:
        head, wholes = yield from self._with_texts(prompt, responses)
        ids, crossings = [], []
        for text, whole in zip(responses, wholes, strict=True):
            response, crosses = yield from self._after(head, whole, text)
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
        return Group(self._prompt_ids(source, head), ids), any(crossings)

    def _conversation(
        self, source: str, prompt: tuple[Message, ...], responses: list[tuple[Message, ...]]
    ) -> Work[list[Encoded]]:
        try:
            rendered = render_examples(self._render, prompt, responses, self._stops)
        except TemplateError as error:
            raise DataFault(source, str(error)) from None
        found = []
        for head, sides in rendered:
            found.append((yield from self._example(source, head, sides)))
        return found

    def _example(self, source: str, head_text: str, sides: list[list[Piece]]) -> Work[Encoded]:
        head, wholes = yield from self._with_texts(head_text, [pieces[0][0] for pieces in sides])
        ids, masks, crossings = [], [], []
        for pieces, whole in zip(sides, wholes, strict=True):
            first, crosses = yield from self._after(head, whole, pieces[0][0])
            later = yield from self._continuations([text for text, _ in pieces[1:]])
            response, mask = self._response([first, *later], pieces)
            if not any(mask):
                raise DataFault(source, "the chat template leaves no assistant token to learn")
            ids.append(response)
            masks.append(mask)
            crossings.append(crosses)
        return Group(self._prompt_ids(source, head), ids, masks), any(crossings)

    def _response(
        self, parts: list[list[int]], pieces: list[Piece]
    ) -> tuple[list[int], list[bool]]:
        """Return the tokens and the mask of a response up to its end, from those of its pieces."""
        ids: list[int] = []
        mask: list[bool] = []
        end_follows = False
        for part, (_, learned) in zip(parts, pieces, strict=True):
            end = place_of_end(self._tokenizer, part, self._ends, self._special) if learned else -1
            num_learned = (len(part) if end < 0 else end + 1) if learned else int(end_follows)
            ids += part
            mask += [place < num_learned for place in range(len(part))]
            end_follows = learned and end < 0
        num_used = 1 + max((place for place, used in enumerate(mask) if used), default=-1)
        ids, mask = ids[:num_used], mask[:num_used]
        if end_follows:  # without an end the model would never learn to stop
            ids, mask = [*ids, self._missing_end], [*mask, True]
        return ids, mask
