"""Tokenizers: loading them, and comparing their vocabularies, end and pad tokens, and templates."""

import copy
import json
import re
import signal
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

from fastalign.data.conversation import REASONING, REASONING_KEYS, Message, content_as_json
from fastalign.data.template import Stops, Template, TemplateError, ends_of_answers
from fastalign.in_memory import GivenModel, model_of, origin
from fastalign.model_files import TOKENIZER, read_object, reading
from fastalign.nearest import did_you_mean, nearest_path
from fastalign.written_files import ADAPTER_CONFIG

PAD_TOKEN = "<|fastalign_pad|>"
# Seconds of computing time after which a template is taken for one that never ends.
MAX_RENDER_SECONDS = 20.0
# The time that templates which write a date are given, so that one run renders one date.
_TEMPLATE_CLOCK: ContextVar[datetime] = ContextVar("template_clock", default=datetime.now())  # noqa: B039
# A text that a tokenizer of English keeps; see `_check_round_trip`.
_SENTENCE = "What is 2 and 3? It is 5, of course."
_FILE_STEMS = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")


class Tokenizer(Protocol):
    """The part of transformers' tokenizers that this package uses."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    eos_token: str | None
    pad_token: str | None
    chat_template: Any
    name_or_path: str
    vocab_size: int
    added_tokens_decoder: Mapping[int, Any]

    def __call__(self, text: Any, **options: Any) -> Any:
        """Return the token ids of a text or of a list of texts."""

    def decode(self, token_ids: Any, **options: Any) -> str:
        """Return the text of token ids."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Return the text of a conversation."""

    def save_pretrained(self, save_directory: Any, **options: Any) -> Any:
        """Write the tokenizer's files into a folder."""

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token."""

    def add_special_tokens(self, special_tokens_dict: Any) -> int:
        """Set special tokens; new ones get the next ids."""

    def __len__(self) -> int:
        """Return the number of tokens, added ones included."""


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer of a model folder or hub name, or copy one in memory.

    A missing pad token becomes EOS: no mask is ever derived from token ids, so a model still learns
    to stop.

    Raises:
        ValueError: if there is none at `path`, or its files are damaged.
        FileNotFoundError: if `path` is a folder that does not exist.
    """
    from transformers import AutoTokenizer

    if isinstance(path, GivenModel):
        return _given_tokenizer(path, trust_remote_code=trust_remote_code)
    name = str(path)
    local = Path(name).expanduser()
    if local.is_file():
        raise ValueError(f"tokenizer {name}: expected a model folder or a hub name, got a file")
    here = local.exists()
    if not here and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        beside = did_you_mean(nearest_path(name))
        raise FileNotFoundError(f"model {name}: no such folder{beside}")
    if here and not any(any(local.glob(f"{stem}*")) for stem in _FILE_STEMS):
        raise ValueError(f"tokenizer {name}: the folder has no tokenizer's files")
    failed = f"tokenizer {name}: cannot be loaded"
    if not here:
        beside = did_you_mean(nearest_path(name))
        failed = f"model {name}: no such folder here{beside}, and not from the hub"
    with reading(failed, local, *TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(
            str(local) if here else name, trust_remote_code=trust_remote_code
        )
        tokenizer("a")  # some settings are first looked at here
    return _checked(tokenizer, name)


def _checked(tokenizer: Any, name: str) -> Tokenizer:
    """Return a tokenizer with a pad token, once it is known to keep text."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded: Tokenizer = tokenizer
    _check_round_trip(loaded, name)
    return loaded


def _given_tokenizer(given: GivenModel, *, trust_remote_code: bool) -> Tokenizer:
    """Return a copy of the tokenizer that was handed over, or load the one that belongs to a model.

    Raises:
        ValueError: if it is none of transformers, or the model does not know of one.
    """
    from transformers import PreTrainedTokenizerBase

    tokenizer = given.tokenizer
    if tokenizer is None and not origin(given):
        raise ValueError(
            f"tokenizer: expected one, since the {given.argument} was made in memory and names no "
            "folder or hub name (name_or_path), got none"
        )
    if tokenizer is None or isinstance(tokenizer, str):
        return load_tokenizer(tokenizer or origin(given), trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            "tokenizer: expected a tokenizer of transformers, a folder or a hub name, got "
            f"{type(tokenizer).__name__}"
        )
    return _checked(copy.deepcopy(tokenizer), "(in memory)")


def _check_round_trip(tokenizer: Tokenizer, name: str) -> None:
    """Check that text survives its tokens, letter case apart.

    transformers 5 builds some tokenizers by the class that their files name and not by their
    `tokenizer.json`; DeepSeek's then loses every space. A tokenizer of another alphabet, which
    loses letters too, is left alone.

    Raises:
        ValueError: if spaces, digits or marks are lost.
    """
    ids = tokenizer(_SENTENCE, add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    before, after = _SENTENCE.lower(), text.strip().lower()
    if before != after and list(filter(str.isalpha, before)) == list(filter(str.isalpha, after)):
        raise ValueError(
            f"tokenizer {name}: loses characters: {_SENTENCE!r} is decoded as {text!r}; if its "
            "tokenizer.json is right, name PreTrainedTokenizerFast as tokenizer_class in its "
            "tokenizer_config.json"
        )


def is_plain(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer's call is transformers' own around a Rust tokenizer.

    Then that can be called itself, without offsets, in two thirds of the time.
    """
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    own = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and own.__call__ is PreTrainedTokenizerBase.__call__
        and getattr(own, "_encode_plus", None) is PreTrainedTokenizerFast._encode_plus
    )


# Patterns that GPT-2, Llama 3 and Qwen 2 split text by. At a space between these characters each
# begins a new part, whatever stands further before or behind.
_BETWEEN_WORDS = re.compile("[!-~] [A-Za-z]")
_END = r"|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
_SPLITS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+" + _END,
    _LETTERS + _LINES + _END,
    _LETTERS + "{1,3}" + _LINES + _END,
}


def splits_at_spaces(tokenizer: Any) -> bool:
    """Return whether a plain tokenizer's tokens before a `last_word` are the same for any word.

    It is a BPE of the parts that a known pattern makes, and no added token reaches over a space.
    """
    backend = tokenizer.backend_tokenizer
    if type(backend.model).__name__ != "BPE" or backend.model.dropout is not None:
        return False
    if type(backend.normalizer).__name__ not in ("NoneType", "NFC"):
        return False
    added = tokenizer.added_tokens_decoder.values()
    if any(t.lstrip or t.rstrip or t.single_word or re.search(r"\S\s", t.content) for t in added):
        return False
    split_by = backend.pre_tokenizer
    match None if split_by is None else json.loads(split_by.__getstate__()):
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"} as split,
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern in _SPLITS and not split["invert"]
    return False


def last_word(text: str) -> int:
    """Return the place of the space before the last word; 0 if there is none."""
    place = len(text)
    while (place := text.rfind(" ", 0, place)) > 0:
        if _BETWEEN_WORDS.match(text, place - 1):
            return place
    return 0


def backend_as_it_is(tokenizer: Any) -> Any:
    """Return a plain tokenizer's Rust tokenizer; None if an earlier call left it to pad or cut."""
    backend = tokenizer.backend_tokenizer
    left = backend.padding or backend.truncation
    split = backend.encode_special_tokens != tokenizer.split_special_tokens
    return None if left or split else backend


def check_same_vocabulary(
    policy: Tokenizer,
    other: Tokenizer,
    name: str = "reference.path",
    *,
    may_have_more: bool = False,
) -> None:
    """Check that another model has the policy's tokens under the same ids.

    So log-probs can be compared. A reward model with a pad token of its own (`use_distinct_pad`)
    may have one more.

    Raises:
        ValueError: if not; names the argument `name` and a token that differs.
    """
    ours, theirs = policy.get_vocab(), other.get_vocab()
    names = ours.keys() if may_have_more else ours.keys() | theirs.keys()
    different = [token for token in names if ours.get(token) != theirs.get(token)]
    if different:
        token = min(different)
        raise ValueError(
            f"{name}: expected the policy's tokens, but token {token!r} is {ours.get(token)} in "
            f"{policy.name_or_path} and {theirs.get(token)} in {other.name_or_path}"
        )


@lru_cache(maxsize=2)
def _known_ids(tokenizer: Tokenizer, num_tokens: int) -> frozenset[int]:
    """Return the ids that are tokens; `num_tokens` changes when tokens are added."""
    return frozenset(tokenizer.get_vocab().values())


def num_foreign_ids(tokenizer: Tokenizer, responses: Iterable[Sequence[int]]) -> int:
    """Return the number of sampled ids that are no token, which a padded vocabulary has.

    They are drawn, and trained on, with the probabilities of the model as it is: to leave them out
    of the draw alone would make samples of another distribution than that of the log-probs.
    """
    hashable: Any = tokenizer
    known = _known_ids(hashable, len(tokenizer))
    return sum(token not in known for response in responses for token in response)


def foreign_ids_line(tokenizer: Tokenizer, number: int) -> str:
    """Return the line printed for sampled ids that are no token."""
    return (
        f"{number} sampled ids are no token of the tokenizer, which has {len(tokenizer)}: they are "
        "decoded to nothing, and count as tokens of the answer"
    )


def print_added_tokens(tokenizer: Tokenizer, rows: Iterable[Collection[int]]) -> None:
    """Print which added tokens an adapter's training data have.

    An adapter does not train the embedding, where a token that was added to a model may have
    a random row. Whether it has cannot be told from its numbers.
    """
    used = set().union(*rows)
    added = [
        token.content
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if number in used and number >= tokenizer.vocab_size
    ]
    if not added:
        return
    more = f" and {len(added) - 8} more" if len(added) > 8 else ""
    print(
        f"added tokens in the data: {', '.join(map(repr, added[:8]))}{more}; their embeddings stay "
        "as they are under an adapter, random if the base was not trained with them: then train "
        "it without an adapter (--model.lora.rank 0) first"
    )


def use_distinct_pad(tokenizer: Tokenizer, ends: Collection[int]) -> int:
    """Give the tokenizer a pad token that no response ends with, unless it has one.

    transformers' sequence classifiers find a response's end by ids: they would take a last token
    that is the pad token for padding.

    `ends` are the tokens that a response can end with.

    Returns:
        The pad token's id.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    assert tokenizer.pad_token_id is not None
    return tokenizer.pad_token_id


def eos_token_ids(tokenizer: Tokenizer, path: str | Path | None = None) -> tuple[int, ...]:
    """Return the token ids at which generation stops, sorted.

    They are the tokenizer's EOS, the special token with which its chat template ends an answer, and
    those that the generation configuration of a model lists. `path` is the model's folder or hub
    name, or a model in memory; an adapter's folder without that file has its base's.

    Raises:
        ValueError: if there is no such token, or the file is damaged.
    """
    found = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    listed, file = _listed_ends(path)
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(number) is int and 0 <= number < 2**31 for number in ids):
        raise ValueError(f"{file}: expected token ids as eos_token_id, got {listed!r}")
    found |= set(ids)
    if tokenizer.chat_template:
        hashable: Any = tokenizer
        found |= _template_ends(hashable, str(tokenizer.chat_template), frozenset(found))
    if not found:
        raise ValueError(f"tokenizer {tokenizer.name_or_path}: has no EOS token")
    return tuple(sorted(found))


def _listed_ends(path: str | Path | None) -> tuple[Any, str]:
    """Return the `eos_token_id` of a model's generation configuration, and where it stands."""
    model = model_of(path)
    if model is not None:
        listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        return listed, f"generation_config of {path}"
    file = None if path is None or not str(path) else _generation_config(path)
    return (None, "") if file is None else (read_object(file).get("eos_token_id"), str(file))


def _generation_config(path: str | Path, *, of_base: bool = False) -> Path | None:
    """Return the file of a folder or of the hub that lists a model's end tokens, or None."""
    from transformers.utils import cached_file

    name, file = str(path), "generation_config.json"
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:  # no name of the hub
            return None
        with reading(f"{file} of {name}", name):
            found = cached_file(
                name,
                file,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        return None if found is None else Path(found)
    if (folder / file).is_file():
        return folder / file
    adapter = folder / ADAPTER_CONFIG
    if of_base or not adapter.is_file():
        return None
    base = read_object(adapter).get("base_model_name_or_path")
    return _generation_config(base, of_base=True) if base and isinstance(base, str) else None


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the special tokens that can end an answer: all but BOS."""
    return {
        int(number)
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and number != tokenizer.bos_token_id
    }


@lru_cache(maxsize=2**16)
def _is_white(tokenizer: Tokenizer, token: int) -> bool:
    """Return whether a token is white space."""
    return not tokenizer.decode([token]).strip()


def place_of_end(
    tokenizer: Tokenizer, ids: Sequence[int], ends: Collection[int], special: Collection[int]
) -> int:
    """Return the place of the token that ends an answer, or -1; see `Stops.end`.

    It is the first of `ends`, or else the last of `special`, of those and the white space with
    which the answer closes.
    """
    first = last = -1
    hashable: Any = tokenizer
    for place in reversed(range(len(ids))):
        if ids[place] in special:
            last = max(last, place)
            first = place if ids[place] in ends else first
        elif not _is_white(hashable, ids[place]):
            break
    return last if first < 0 else first


def texts_of_stops(tokenizer: Tokenizer, ends: Collection[int], special: Collection[int]) -> Stops:
    """Return the texts of the tokens that may end an answer."""
    added = tokenizer.added_tokens_decoder
    texts = {
        number: added[number].content if number in added else tokenizer.decode([number])
        for number in special
    }
    return Stops(tuple(texts[number] for number in ends), tuple(texts.values()))


@lru_cache(maxsize=4)
def _template_ends(tokenizer: Tokenizer, template: str, others: frozenset[int]) -> frozenset[int]:
    """Return the special token with which a chat template ends an answer, if it has one.

    Some write more behind the last answer than behind an earlier one: then it is the token that
    both have (Phi-3's <|end|>), and where they have none, that of the last (gpt-oss's <|return|>).

    Answers are cut behind the same token when they are tokenised for training. A template that
    refuses a plain question with its answer has none; it may be there for other rows. `template`
    is the tokenizer's, which it can change; `others` are the end tokens that are known otherwise.
    """
    ends = _ends_of_answers(tokenizer)
    if ends is None:
        return frozenset()
    last, earlier = ends
    common = [one for one, other in zip(last, earlier, strict=False) if one == other]
    common = common if last[: len(common)] == common else []
    special = special_ids(tokenizer) | others
    for ids in (common, last):
        place = place_of_end(tokenizer, ids, (), special)
        if place >= 0:
            return frozenset({int(ids[place])})
    return frozenset()


def _ends_of_answers(tokenizer: Tokenizer) -> tuple[list[int], list[int]] | None:
    """Return the tokens behind the last answer and behind an earlier one; None: it refuses them."""
    try:
        texts = ends_of_answers(chat_template(tokenizer))
    except TemplateError:
        return None
    last, earlier = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return last, earlier


def missing_end(tokenizer: Tokenizer, ends: Collection[int]) -> int:
    """Return the end token to add to an answer behind which its chat template writes none.

    It is EOS, or the end token with which the template begins the next message (GLM's <|user|>).
    """
    found = _ends_of_answers(tokenizer) if tokenizer.chat_template else None
    begin = [] if found is None else found[1][:1]
    assert tokenizer.eos_token_id is not None
    return begin[0] if begin and begin[0] in ends else int(tokenizer.eos_token_id)


def chat_template(tokenizer: Tokenizer) -> Template:
    """Return the tokenizer's chat template as a function of messages.

    The function raises TemplateError if the template refuses a conversation.

    Raises:
        ValueError: if the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"the rows are conversations, but the tokenizer {tokenizer.name_or_path or ''} has no "
            "chat template; use one of an instruction model, or rows of plain text"
        )
    return _ChatTemplate(tokenizer)


class _ChatTemplate:
    """A tokenizer's chat template, given messages in the form that it reads."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._source = source = str(tokenizer.chat_template)
        named = (key for key in REASONING_KEYS if re.search(rf"[.'\"]{key}\b", source))
        self._reasoning = next(named, None)

    def __call__(self, turns: Sequence[Message], add_generation_prompt: bool) -> str:
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
        conversation = content_as_json(turns)
        if turns and turns[0].tools:
            options["tools"] = conversation[0].pop("tools")
        calls = []
        for turn in conversation:
            if REASONING in turn:
                if self._reasoning is None:
                    raise TemplateError(f"the chat template does not read {REASONING}")
                turn[self._reasoning] = turn.pop(REASONING)
            calls += [call["function"] for call in turn.get("tool_calls", [])]
            if self._reads_parts:
                turn["content"] = [{"type": "text", "text": turn["content"]}]
        try:
            return self._apply(conversation, **options)
        except TemplateError:
            # Some templates, such as DeepSeek's, want the arguments of a call as JSON text.
            for call in calls:
                call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
            with suppress(TemplateError):
                if calls:
                    return self._apply(conversation, **options)
            raise

    @cached_property
    def _reads_parts(self) -> bool:
        """True if it shows a content that is a list of parts, and not one that is text."""
        parts = [{"type": "text", "text": "\ue000"}]
        for content in ("\ue000", parts) if "type" in self._source else ():
            with suppress(TemplateError):
                if "\ue000" in self._apply([{"role": "user", "content": content}]):
                    return content is parts
        return False

    def _apply(self, conversation: list[dict[str, Any]], **options: Any) -> str:
        import jinja2

        if "strftime_now" in self._source:
            options["strftime_now"] = _TEMPLATE_CLOCK.get().strftime
        try:
            with _limited_time(MAX_RENDER_SECONDS):
                text = self._tokenizer.apply_chat_template(conversation, tokenize=False, **options)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template refuses the row: {error}"[:400]) from None
        # A template is a program, which can fail in any way: 1/0, recursion, a missing attribute.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:300]
            raise TemplateError(f"the chat template fails on the row: {reason}") from None
        return str(text)


def template_times(tokenizer: Tokenizer) -> list[str]:
    """Return what the chat template writes of the time, as far as its text shows, or the time."""
    text, now = str(tokenizer.chat_template), _TEMPLATE_CLOCK.get()
    formats = re.findall(r"""strftime_now\(\s*(?:"([^"']*)"|'([^"']*)')\s*\)""", text)
    if len(formats) < len(re.findall(r"strftime_now(?! is defined)", text)):
        return [now.isoformat()]
    return [now.strftime(double or single) for double, single in formats]


@contextmanager
def template_clock(moment: datetime) -> Iterator[None]:
    """Give templates that write a date this time instead of that at which the process began."""
    token = _TEMPLATE_CLOCK.set(moment)
    try:
        yield
    finally:
        _TEMPLATE_CLOCK.reset(token)


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after this much computing time, if this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield  # a signal's handler runs in the main thread only
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"it did not end within {seconds:g} seconds of computing")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # unlike real time, it stands in a stop
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
