"""A source to token ids; rows that cannot be used raise an error or are counted, as asked."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from fastalign.batch.packed import Group
from fastalign.batch.schedule import Mixture, num_drawn
from fastalign.batch.stored import Lazy, StoredGroups, joined, list_lengths, stored
from fastalign.data.columns import RowColumns
from fastalign.data.encode import (
    DIGEST_BYTES,
    OnTooLong,
    Rules,
    Ties,
    as_text,
    batched,
    encode_prompts,
    encode_rows,
    in_order,
    prompt_schema,
    row_schema,
    unpacked_content,
)
from fastalign.data.examples import Content, PreferenceExample, Votes
from fastalign.data.read import NO_COLUMNS, OnBadRow, read_examples
from fastalign.data.readers.row import DataFault
from fastalign.data.readers.rows import amount_of
from fastalign.data.report import DataReport
from fastalign.data.token_cache import Write, load_tokens
from fastalign.data.tokenise import Encoder
from fastalign.data.tokenizer import Tokenizer
from fastalign.data_sources import WeightedSource
from fastalign.output import visible
from fastalign.progress import phase

BATCH_ROWS = 256
LENGTH_ADVICE = "raise --data.max-length, or use --data.on-too-long skip or truncate"


@dataclass(frozen=True)
class SourcePart:
    """One source of a data set.

    Attributes:
        source: a file, a folder or a hub name.
        weight: how often an epoch has each of its rows.
        num_rows: rows read, those that were left out among them.
        num_examples: its examples.
        num_drawn: examples of it in an epoch.
        fingerprint: SHA-256 of its examples.
    """

    source: str
    weight: float
    num_rows: int
    num_examples: int
    num_drawn: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class OfSources:
    """A data set that knows its sources.

    Attributes:
        parts: its sources, whose examples lie one behind the other; empty where there is one whose
            examples an epoch has once each.
    """

    parts: tuple[SourcePart, ...] = ()

    def __len__(self) -> int:
        """Return the number of examples."""
        raise NotImplementedError

    @property
    def mixture(self) -> Mixture:
        """The draws of an epoch."""
        if not self.parts:
            return Mixture((len(self),), (len(self),))
        counts = [(part.num_examples, part.num_drawn) for part in self.parts]
        sizes, drawn = zip(*counts, strict=True)
        return Mixture(sizes, drawn)


@dataclass(frozen=True)
class TokenizedDataset(OfSources):
    """Examples as token ids, nearly always one of a row; the sequences are parallel.

    Attributes:
        groups: prompt and responses of each row: one response for SFT; for preferences chosen and
            rejected, or in a tie a and b.
        ties: True for each row that is a tie.
        margins: each row's margin, or None.
        votes: each row's votes, those for the first response as `a`, or None.
        labels: True for a good and False for a bad answer, None for other rows.
        sources: each row's location, such as `file.jsonl:12`.
        report: counts of the rows read and left out.
        fingerprint: SHA-256 of the groups, ties, margins, votes and labels.
    """

    groups: Sequence[Group]
    ties: list[bool]
    margins: list[float | None]
    votes: list[Votes | None]
    labels: list[bool | None]
    sources: Sequence[str]
    report: DataReport
    fingerprint: str

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.groups)

    @classmethod
    def joined(
        cls, found: Sequence["TokenizedDataset"], parts: tuple[SourcePart, ...]
    ) -> "TokenizedDataset":
        """Return several data sets as one, the first in front."""
        return cls(
            StoredGroups.joined([stored(data.groups) for data in found]),
            [tie for data in found for tie in data.ties],
            [margin for data in found for margin in data.margins],
            [votes for data in found for votes in data.votes],
            [label for data in found for label in data.labels],
            joined([data.sources for data in found]),
            DataReport.joined([data.report for data in found]),
            joined_fingerprint(parts),
            parts=parts,
        )


@dataclass(frozen=True)
class PromptDataset(OfSources):
    """Prompts as token ids; the sequences are parallel.

    Attributes:
        prompt_ids: the tokens that a sampler continues.
        prompts: plain text, or the messages.
        sources: each row's location.
        report: counts of the rows read and left out.
        fingerprint: SHA-256 of the prompts, their token ids and columns.
        columns: values of each row that reward functions take, by the column's name; empty if they
            take none.
    """

    prompt_ids: Sequence[list[int]]
    prompts: Sequence[Content]
    sources: Sequence[str]
    report: DataReport
    fingerprint: str
    columns: Sequence[Mapping[str, Any]] = ()

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.prompts)

    @classmethod
    def joined(
        cls, found: Sequence["PromptDataset"], parts: tuple[SourcePart, ...]
    ) -> "PromptDataset":
        """Return several data sets as one, the first in front."""
        return cls(
            joined([data.prompt_ids for data in found]),
            joined([data.prompts for data in found]),
            joined([data.sources for data in found]),
            DataReport.joined([data.report for data in found]),
            joined_fingerprint(parts),
            joined([data.columns for data in found]) if found[0].columns else (),
            parts=parts,
        )

    def first(self) -> "PromptDataset":
        """Return the first prompt alone."""
        return replace(
            self,
            prompt_ids=self.prompt_ids[:1],
            prompts=self.prompts[:1],
            sources=self.sources[:1],
            columns=self.columns[:1],
            parts=(),
        )

    def columns_at(self, indices: Iterable[int], num_samples: int = 1) -> dict[str, list[Any]]:
        """Return each column at these rows, a value `num_samples` times; None: a row lacks it."""
        if not self.columns:
            return {}
        rows = [self.columns[index] for index in indices]
        return {
            name: [row.get(name) for row in rows for _ in range(num_samples)]
            for name in sorted(self.report.given_columns)
        }


Dataset = TypeVar("Dataset", TokenizedDataset, PromptDataset)


def load_sources_of_data(
    sources: Sequence[WeightedSource], load: Callable[[str], Dataset]
) -> Dataset:
    """Return the examples of all sources, one source behind the other, with their weights.

    `load` returns the examples of one, by its path.
    """
    found = [load(source.path) for source in sources]
    parts = tuple(
        SourcePart(
            source.path,
            source.weight,
            data.report.num_rows,
            len(data),
            num_drawn(len(data), source.weight),
            data.fingerprint,
        )
        for source, data in zip(sources, found, strict=True)
    )
    if len(found) == 1:
        return replace(found[0], parts=parts)
    return type(found[0]).joined(found, parts)


def joined_fingerprint(parts: Sequence[SourcePart]) -> str:
    """Return the fingerprint of the examples of several sources together."""
    content = json.dumps([part.fingerprint for part in parts])
    return hashlib.sha256(content.encode()).hexdigest()


def print_sources(parts: Sequence[SourcePart]) -> None:
    """Print each source of the training data with its share of an epoch, unless it is all of it."""
    total = sum(part.num_drawn for part in parts)
    for part in parts if len(parts) > 1 or parts[0].weight != 1 else ():
        print(
            f"data.train: {visible(part.source)}: {part.num_examples} examples, weight "
            f"{part.weight:g}: {part.num_drawn} of the {total} of an epoch "
            f"({100 * part.num_drawn / total:.1f} %)"
        )


def load_prompts(
    source: str | Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    on_bad_row: OnBadRow = "error",
    on_too_long: Literal["error", "skip"] = "error",
    advice: str = "raise --data.max-length, or use --data.on-too-long skip",
    columns: RowColumns = NO_COLUMNS,
) -> PromptDataset:
    """Load prompts to answer from the column `prompt`, and the `columns` that rewards take.

    The arguments are those of `load_examples`, and a large source is kept as there; a prompt has at
    most `max_length` tokens. Other columns are ignored.

    Raises:
        ValueError: if a row is bad or too long under `error`, or no row is left.
    """
    rules = Rules("prompt", max_length, on_bad_row, on_too_long, "error", advice, columns)
    table, report, fingerprint = load_rows(source, Encoder(tokenizer), rules)
    ids, packed, where = (table.column(name) for name in ("prompt_ids", "prompt", "source"))
    report.prompt_lengths = list_lengths(ids)
    report.absent_columns = [c for c in columns.optional if c not in report.given_columns]
    values = table.column("columns") if columns else None
    return PromptDataset(
        Lazy(len(table), lambda index: ids[index].as_py()),
        Lazy(len(table), lambda index: unpacked_content(packed[index].as_py())),
        Lazy(len(table), lambda index: as_text(where[index].as_py())),
        report,
        fingerprint,
        () if values is None else Lazy(len(table), lambda i: json.loads(values[i].as_py())),
    )


def load_examples(
    source: str | Path,
    kind: Literal["sft", "preference", "unpaired"],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    on_bad_row: OnBadRow = "error",
    on_too_long: OnTooLong = "error",
    ties: Ties = "error",
    advice: str = LENGTH_ADVICE,
) -> TokenizedDataset:
    """Load demonstrations or comparisons from a file, a folder, the hub or rows in memory.

    Columns of demonstrations (`sft`) are `text`, `messages`, or `prompt` and `completion`; of
    comparisons `chosen` and `rejected`, or `response_a`, `response_b` and `label`; of unpaired
    answers `prompt`, `completion` and `label` (true or false), or those of comparisons, which are
    two examples each. A prompt with its response has at most `max_length` tokens. `error` raises
    the first bad or long row, or tie; `skip` and `drop` count it, `truncate` cuts the response and
    counts it, `keep` is for losses with ties. The error on a long row ends with `advice`, which
    names the command's own flags.

    A large source is tokenised by as many processes as there are cores, into a file that later
    calls map (see `token_cache`).

    Raises:
        ValueError: if a row is bad, too long or a tie under `error`, or no row is left.
    """
    rules = Rules(kind, max_length, on_bad_row, on_too_long, ties, advice)
    table, report, fingerprint = load_rows(source, Encoder(tokenizer), rules)
    groups = StoredGroups(table)
    report.prompt_lengths, report.response_lengths = groups.prompt_lengths, groups.response_lengths
    where = table.column("source")
    return TokenizedDataset(
        groups,
        table.column("tie").to_pylist(),
        table.column("margin").to_pylist(),
        [votes and Votes(*votes) for votes in table.column("votes").to_pylist()],
        table.column("label").to_pylist(),
        Lazy(len(table), lambda index: as_text(where[index].as_py())),
        report,
        fingerprint,
    )


def load_rows(source: str | Path, encoder: Encoder, rules: Rules) -> tuple[Any, DataReport, str]:
    """Return the table of a source's rows, the report without lengths, and the fingerprint.

    Raises:
        ValueError: as `load_examples`.
    """
    table, meta = load_tokens(
        source,
        lambda: (encoder.identity(), replace(rules, advice="")),
        partial(tokenise_shown, source, encoder, rules),
    )
    return table, DataReport.from_dict(str(source), meta["report"]), meta["fingerprint"]


def tokenise_shown(
    source: str | Path, encoder: Encoder, rules: Rules, write: Write, num_processes: int
) -> dict[str, Any]:
    """Do as `tokenise` does, as a phase that shows how much of the source is done."""
    with phase(f"tokenising {source}", *amount_of(source)):
        return tokenise(source, encoder, rules, write, num_processes)


def tokenise(
    source: str | Path, encoder: Encoder, rules: Rules, write: Write, num_processes: int
) -> dict[str, Any]:
    """Write the rows of a source as tokens; return their report and fingerprint.

    Raises:
        ValueError: as `load_examples`.
    """
    report = DataReport(str(source))
    refused: list[tuple[int, DataFault]] = []  # and the faults of earlier rows that the reader has
    of_prompts = rules.kind == "prompt"
    digests, content = bytearray(), hashlib.sha256(b"[" if of_prompts else b"")
    encode, schema = (encode_prompts, prompt_schema) if of_prompts else (encode_rows, row_schema)
    work = partial(encode, encoder, schema(encoder, rules), rules)
    batches = batched(usable_examples(source, rules, report), BATCH_ROWS)
    for batch, found in in_order(work, batches, num_processes, name=str(source)):
        for place, refusal in found.refused:
            example, num_faults = batch[place]
            if isinstance(refusal, int):
                lengths = (refusal, rules.max_length)
                refuse_long(report, example.source, lengths, rules.on_too_long, rules.advice)
            elif rules.on_bad_row == "error":
                raise DataFault(*refusal)
            else:
                refused.append((num_faults, DataFault(*refusal)))
        write(found.rows)
        if not of_prompts:
            digests += found.content
        elif report.num_used and found.content:
            content.update(b", ")
        content.update(found.content)
        more = found.num_examples_of_split - found.num_split + found.num_pairs_split
        report.num_used += len(found.rows) - more
        report.num_pairs_split += found.num_pairs_split
        report.forms.update(found.forms)
        report.num_split += found.num_split
        report.num_examples_of_split += found.num_examples_of_split
        report.num_crossing += found.num_crossing
        report.num_truncated += found.num_truncated
        report.num_ties += found.num_ties
    # In the order of the file: the reader's fault n comes behind rows that were read before it.
    read = ((number, 1, fault) for number, fault in enumerate(report.faults))
    late = ((number, 0, fault) for number, fault in refused)
    report.faults = [fault for *_, fault in sorted((*read, *late), key=lambda entry: entry[:2])]
    require_rows(report)
    content.update(b"]" if of_prompts else b"")
    keys = np.frombuffer(digests, f"S{DIGEST_BYTES}")
    report.num_duplicates = len(keys) - len(np.unique(keys))
    return {"report": report.as_dict(), "fingerprint": content.hexdigest()}


def usable_examples(
    source: str | Path, rules: Rules, report: DataReport
) -> Iterator[tuple[Any, int]]:
    """Yield examples, each with the number of faults read before it; drop ties if asked for."""
    options: Any = {"on_bad_row": rules.on_bad_row, "columns": rules.columns}
    for example in read_examples(source, rules.kind, report, **options):
        if isinstance(example, PreferenceExample) and example.tie:
            if rules.ties == "error" and rules.kind == "unpaired":
                problem = "a tie is neither good nor bad; drop ties (--data.ties drop)"
                raise DataFault(example.source, problem, "label")
            if rules.ties == "error":
                raise DataFault(
                    example.source,
                    "a tie, which this loss does not support; drop ties (--data.ties drop) or use "
                    "a loss with ties (--loss dpo_rao_kupper or dpo_davidson; for a reward model "
                    "rao_kupper or davidson)",
                    "label",
                )
            if rules.ties == "drop":
                report.num_ties_dropped += 1
                continue
        yield example, len(report.faults)


def refuse_long(
    report: DataReport, source: str, lengths: tuple[int, int], on_too_long: str, advice: str
) -> None:
    """Raise an error for a row whose length is over the upper limit (`lengths`), or count it."""
    if on_too_long == "error":
        length, limit = lengths
        raise DataFault(source, f"expected at most {limit} tokens, got {length}; {advice}")
    report.num_too_long += 1


def require_rows(report: DataReport) -> None:
    """Check that a row is left of the source."""
    if report.num_used == 0:
        why = report.losses_line() or f"{report.source}: no rows"
        first = f"; the first fault: {report.faults[0]}" if report.faults else ""
        raise DataFault(report.source, f"no row is left to use: {why}{first}")
