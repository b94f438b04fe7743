"""Checked examples to columns of token ids, by several processes, in the order of the file."""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from fastalign.batch.packed import Group
from fastalign.batch.stored import group_columns, group_fields
from fastalign.data.columns import Kind, RowColumns
from fastalign.data.conversation import Message
from fastalign.data.examples import (
    Content,
    Example,
    PreferenceExample,
    PromptExample,
    UnpairedExample,
)
from fastalign.data.read import NO_COLUMNS, OnBadRow
from fastalign.data.readers.row import DataFault
from fastalign.data.tokenise import Encoded, Encoder

OnTooLong = Literal["error", "skip", "truncate"]
Ties = Literal["error", "keep", "drop"]
DIGEST_BYTES = 32
# Batches of a process that wait or are read already, so that none runs dry.
BATCHES_AHEAD = 3

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Rules:
    """Rules by which rows are taken, truncated or refused; see `load_examples`.

    `columns` are those of a prompt that reward functions take.
    """

    kind: Kind
    max_length: int
    on_bad_row: OnBadRow
    on_too_long: OnTooLong
    ties: Ties
    advice: str
    columns: RowColumns = NO_COLUMNS


class EncodedRows(NamedTuple):
    """The rows of a batch as tokens.

    Attributes:
        rows: a record batch of `row_schema` or `prompt_schema`.
        refused: the place of each row that is left out, and its tokens if they are too many, else
            the arguments of its DataFault.
        content: what the source's fingerprint is made of: a SHA-256 of each row, or prompts with
            their tokens as text, separated by commas.
        forms: number of rows of each form.
        num_split: rows that are several examples.
        num_examples_of_split: those examples.
        num_crossing: rows in which a token would have crossed from the prompt into a response.
        num_truncated: rows that were truncated.
        num_ties: rows that are ties.
        num_pairs_split: comparisons that are two examples, a good and a bad answer.
    """

    rows: Any
    refused: list[tuple[int, Any]]
    content: bytes
    forms: Counter[str]
    num_split: int = 0
    num_examples_of_split: int = 0
    num_crossing: int = 0
    num_truncated: int = 0
    num_ties: int = 0
    num_pairs_split: int = 0


def row_schema(encoder: Encoder, rules: Rules) -> Any:
    """Return the Arrow schema of rows; the rules do not change it."""
    import pyarrow

    others = {
        "tie": pyarrow.bool_(),
        "margin": pyarrow.float64(),
        "votes": pyarrow.list_(pyarrow.float64()),
        "label": pyarrow.bool_(),
        "source": pyarrow.binary(),
    }
    fields = [pyarrow.field(name, kind) for name, kind in others.items()]
    return pyarrow.schema([*group_fields(encoder.num_ids), *fields])


def prompt_schema(encoder: Encoder, rules: Rules) -> Any:
    """Return the Arrow schema of prompts, with their rows' `columns` if rewards take any."""
    import pyarrow

    ids, *_ = group_fields(encoder.num_ids)
    names = ("prompt", "source", "columns") if rules.columns else ("prompt", "source")
    return pyarrow.schema([ids, *((name, pyarrow.binary()) for name in names)])


def as_bytes(text: str) -> bytes:
    """Encode text that may hold the half surrogate pairs of a path that is not UTF-8."""
    return text.encode("utf-8", "surrogatepass")


def as_text(content: bytes) -> str:
    """Decode what `as_bytes` encoded."""
    return content.decode("utf-8", "surrogatepass")


def encode_rows(
    encoder: Encoder, schema: Any, rules: Rules, batch: Sequence[tuple[Any, int]]
) -> EncodedRows:
    """Tokenise the examples of a batch, of which each has a number that is not used here."""
    import pyarrow

    examples = [example for example, _ in batch]
    kept: list[Any] = []
    groups: list[Group] = []
    marks: list[tuple[Any, ...]] = []  # tie, margin and, if there are any, votes and label
    refused: list[tuple[int, Any]] = []
    digests = []
    counts: Counter[str] = Counter()
    forms: Counter[str] = Counter()
    for place, (example, found) in enumerate(zip(examples, encoder.rows(examples), strict=True)):
        if isinstance(found, DataFault):
            refused.append((place, (found.where, found.problem, found.column)))
            continue
        num_before = len(groups)
        of_pair = rules.kind == "unpaired" and isinstance(example, PreferenceExample)
        for whole, crosses, label in labelled(example, found, of_pair):
            group = fit(whole, rules)
            if isinstance(group, int):
                refused.append((place, group))
                continue
            mark, digest = marks_of(example, group, label)
            counts["num_crossing"] += crosses
            counts["num_truncated"] += group is not whole
            counts["num_ties"] += mark[0]
            digests.append(digest)
            kept.append(example)
            groups.append(group)
            marks.append(mark)
        num_kept = len(groups) - num_before
        forms[example.form] += num_kept > 0
        counts["num_pairs_split"] += of_pair and num_kept == 2
        if len(found) > 1 and num_kept:
            counts["num_split"] += 1
            counts["num_examples_of_split"] += num_kept
    columns = group_columns(groups, list(schema)[:3])
    for number, name in enumerate(("tie", "margin", "votes", "label")):
        columns[name] = pyarrow.array([mark[number] for mark in marks], schema.field(name).type)
    columns["source"] = pyarrow.array([as_bytes(row.source) for row in kept], pyarrow.binary())
    rows = pyarrow.record_batch(columns, schema=schema)
    return EncodedRows(rows, refused, b"".join(digests), +forms, **counts)


def marks_of(example: Example, group: Group, label: bool | None) -> tuple[tuple[Any, ...], bytes]:
    """Return a row's tie, margin, votes and label, and the digest of all that is trained on."""
    tie, margin, votes = False, None, None
    if isinstance(example, PreferenceExample) and label is None:
        tie, margin, votes = example.tie, example.margin, example.votes
    shares = () if votes is None else (votes.shares(),)
    labels = () if label is None else (label,)
    digest = hashlib.sha256(repr((group, tie, margin, *shares, *labels)).encode()).digest()
    counts = None if votes is None else (votes.a, votes.b, votes.tie)
    return (tie, margin, counts, label), digest


def labelled(
    example: Example, found: Sequence[Encoded], of_pair: bool
) -> Iterator[tuple[Group, bool, bool | None]]:
    """Yield each group, whether a token crosses its boundary, and its label; split a pair in two.

    The label is None but for unpaired answers.
    """
    for group, crosses in found:
        if not of_pair:
            label = example.desirable if isinstance(example, UnpairedExample) else None
            yield group, crosses, label
            continue
        masks = group.response_loss_mask or (None, None)
        for response, mask, label in zip(group.response_ids, masks, (True, False), strict=True):
            yield (
                Group(group.prompt_ids, [response], None if mask is None else [mask]),
                crosses and label,
                label,
            )


def encode_prompts(
    encoder: Encoder, schema: Any, rules: Rules, batch: Sequence[tuple[Any, int]]
) -> EncodedRows:
    """Tokenise the prompts of a batch, as `encode_rows` does."""
    import pyarrow

    examples = [example for example, _ in batch]
    kept: list[tuple[PromptExample, list[int]]] = []
    refused: list[tuple[int, Any]] = []
    for place, (example, ids) in enumerate(zip(examples, encoder.prompts(examples), strict=True)):
        if isinstance(ids, DataFault):
            refused.append((place, (ids.where, ids.problem, ids.column)))
        elif len(ids) > rules.max_length:
            refused.append((place, len(ids)))
        else:
            kept.append((example, ids))
    columns = [
        [ids for _, ids in kept],
        [packed_content(example.prompt) for example, _ in kept],
        [as_bytes(example.source) for example, _ in kept],
    ]
    digested: Any = [(ids, example.prompt) for example, ids in kept]
    if rules.columns:
        columns.append([example.columns.encode() for example, _ in kept])
        digested = [(ids, example.prompt, example.columns) for example, ids in kept]
    rows = pyarrow.record_batch(
        [pyarrow.array(column, field.type) for column, field in zip(columns, schema, strict=True)],
        schema=schema,
    )
    content = ", ".join(map(repr, digested)).encode()
    return EncodedRows(rows, refused, content, Counter(example.form for example, _ in kept))


def packed_content(content: Content) -> bytes:
    """Return plain text or messages as bytes."""
    turns = content if isinstance(content, str) else [astuple(message) for message in content]
    return json.dumps(turns).encode()


def unpacked_content(packed: bytes) -> Content:
    """Return what `packed_content` packed."""
    found = json.loads(packed)
    return found if isinstance(found, str) else tuple(Message(*turn) for turn in found)


def fit(group: Group, rules: Rules) -> Group | int:
    """Return the group within `max_length`, truncated if asked for, or its tokens if it is not."""
    num_prompt = len(group.prompt_ids)
    longest = num_prompt + max(len(response) for response in group.response_ids)
    if longest <= rules.max_length:
        return group
    room = rules.max_length - num_prompt
    if rules.on_too_long == "truncate" and room >= 1:
        cut = [list(response[:room]) for response in group.response_ids]
        masks = group.response_loss_mask
        cut_masks = None if masks is None else [list(mask[:room]) for mask in masks]
        kept = Group(group.prompt_ids, cut, cut_masks)
        learned = all(kept.target_positions(number) for number in range(len(cut)))
        if learned and (len(cut) < 2 or cut[0] != cut[1]):
            return kept
    # A row that would have nothing left to train on cannot be truncated.
    return longest


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; if there is an error, first those before it."""
    batch: list[T] = []
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def in_order(
    work: Callable[[S], T], batches: Iterator[S], num_processes: int, *, name: str
) -> Iterator[tuple[S, T]]:
    """Yield each batch with its result, in order; an error of `batches` is raised at its place.

    With more than one process the work is done by forks of this one, which end with it.

    Raises:
        DataFault: if one of them was killed; it has the source's `name`.
    """
    if num_processes == 1:
        yield from ((batch, work(batch)) for batch in batches)
        return
    error: Exception | None = None
    waiting: deque[tuple[S, Future[T]]] = deque()
    try:
        with processes(work, num_processes) as pool:
            while True:
                while error is None and len(waiting) < BATCHES_AHEAD * num_processes:
                    try:
                        batch = next(batches)
                    except StopIteration:
                        break
                    except Exception as raised:  # rows before it come first
                        error = raised
                    else:
                        waiting.append((batch, pool.submit(_do_work, batch)))
                if not waiting:
                    break
                batch, future = waiting.popleft()
                yield batch, future.result()
    except BrokenProcessPool:
        problem = "a process that tokenises was killed; is there enough memory?"
        raise DataFault(name, problem) from None
    if error is not None:
        raise error


@contextmanager
def processes(work: Callable[[Any], Any], number: int) -> Iterator[ProcessPoolExecutor]:
    """Open forks of this process that do `work`, which need not be pickled."""
    pool = ProcessPoolExecutor(number, multiprocessing.get_context("fork"), _begin, (work,))
    try:
        # A tokenizer's threads, and the locks of threads here, are not there after a fork; the
        # forks only run the tokenizer and templates.
        variable = "TOKENIZERS_PARALLELISM"
        before = os.environ.get(variable)
        os.environ[variable] = "false"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pool.submit(int).result()  # starts all of them
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_WORK: Callable[[Any], Any]


def _begin(work: Callable[[Any], Any]) -> None:
    """Begin a process: it leaves signals to its parent, and ends with it."""
    global _WORK
    _WORK = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do_work(batch: Any) -> Any:
    return _WORK(batch)
