"""A source to token ids; rows that cannot be used raise an error or are counted, as asked."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fastalign.batch.packed import Group
from fastalign.data.examples import Content, PreferenceExample, PromptExample, Votes
from fastalign.data.read import OnBadRow, read_examples
from fastalign.data.readers.row import DataFault
from fastalign.data.report import DataReport
from fastalign.data.tokenise import Encoder
from fastalign.data.tokenizer import Tokenizer

OnTooLong = Literal["error", "skip", "truncate"]
Ties = Literal["error", "keep", "drop"]

LENGTH_ADVICE = "raise --data.max-length, or use --data.on-too-long skip or truncate"


@dataclass(frozen=True)
class TokenizedDataset:
    """Rows as token ids; the lists are parallel.

    Attributes:
        groups: prompt and responses of each row: one response for SFT; for preferences chosen and
            rejected, or in a tie a and b.
        ties: True for each row that is a tie.
        margins: each row's margin, or None.
        votes: each row's votes, those for the first response as `a`, or None.
        sources: each row's location, such as `file.jsonl:12`.
        report: counts of the rows read and left out.
        fingerprint: SHA-256 of the groups, ties, margins and votes.
    """

    groups: list[Group]
    ties: list[bool]
    margins: list[float | None]
    votes: list[Votes | None]
    sources: list[str]
    report: DataReport
    fingerprint: str

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.groups)


@dataclass(frozen=True)
class PromptDataset:
    """Prompts as token ids; the lists are parallel.

    Attributes:
        prompt_ids: the tokens that a sampler continues.
        prompts: plain text, or the messages.
        sources: each row's location.
        report: counts of the rows read and left out.
    """

    prompt_ids: list[list[int]]
    prompts: list[Content]
    sources: list[str]
    report: DataReport

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.prompts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the prompts and their token ids."""
        rows = list(zip(self.prompt_ids, self.prompts, strict=True))
        return hashlib.sha256(repr(rows).encode()).hexdigest()


def load_prompts(
    source: str | Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    on_bad_row: OnBadRow = "error",
    on_too_long: Literal["error", "skip"] = "error",
    advice: str = "raise --data.max-length, or use --data.on-too-long skip",
) -> PromptDataset:
    """Load prompts to answer from the column `prompt`; other columns are ignored.

    The arguments are those of `load_examples`; a prompt has at most `max_length` tokens.

    Raises:
        ValueError: if a row is bad or too long under `error`, or no row is left.
    """
    encoder = Encoder(tokenizer)
    report = DataReport(str(source))
    data = PromptDataset([], [], [], report)
    for example in read_examples(source, "prompt", report, on_bad_row=on_bad_row):
        assert isinstance(example, PromptExample)
        try:
            ids = encoder.prompt(example)
        except DataFault as fault:
            refuse(report, fault, on_bad_row)
            continue
        if len(ids) > max_length:
            refuse_long(report, example.source, (len(ids), max_length), on_too_long, advice)
            continue
        report.forms[example.form] += 1
        report.prompt_lengths.append(len(ids))
        data.prompt_ids.append(ids)
        data.prompts.append(example.prompt)
        data.sources.append(example.source)
    report.num_used = len(data.sources)
    require_rows(report)
    return data


def load_examples(
    source: str | Path,
    kind: Literal["sft", "preference"],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    on_bad_row: OnBadRow = "error",
    on_too_long: OnTooLong = "error",
    ties: Ties = "error",
    advice: str = LENGTH_ADVICE,
) -> TokenizedDataset:
    """Load demonstrations or comparisons from a file, a folder or the hub.

    Columns of demonstrations (`sft`) are `text`, `messages`, or `prompt` and `completion`; of
    comparisons `chosen` and `rejected`, or `response_a`, `response_b` and `label`. A prompt with
    its response has at most `max_length` tokens. `error` raises the first bad or long row, or tie;
    `skip` and `drop` count it, `truncate` cuts the response and counts it, `keep` is for losses
    with ties. The error on a long row ends with `advice`, which names the command's own flags.

    Raises:
        ValueError: if a row is bad, too long or a tie under `error`, or no row is left.
    """
    encoder, report = Encoder(tokenizer), DataReport(str(source))
    data = TokenizedDataset([], [], [], [], [], report, "")
    digest = hashlib.sha256()
    seen: set[bytes] = set()
    for example in read_examples(source, kind, report, on_bad_row=on_bad_row):
        assert not isinstance(example, PromptExample)
        compared = example if isinstance(example, PreferenceExample) else None
        tie = compared is not None and compared.tie
        if tie and ties == "error":
            raise DataFault(
                example.source,
                "a tie, which this loss does not support; drop ties (--data.ties drop) or use a "
                "loss with ties (--loss dpo_rao_kupper or dpo_davidson; for a reward model "
                "rao_kupper or davidson)",
                "label",
            )
        if tie and ties == "drop":
            report.num_ties_dropped += 1
            continue
        try:
            whole, crosses = encoder.row(example)
        except DataFault as fault:
            refuse(report, fault, on_bad_row)
            continue
        group = fit(whole, example.source, report, max_length, on_too_long, advice)
        if group is None:
            continue
        margin, votes = (compared.margin, compared.votes) if compared else (None, None)
        data.groups.append(group)
        data.ties.append(tie)
        data.margins.append(margin)
        data.votes.append(votes)
        data.sources.append(example.source)
        report.forms[example.form] += 1
        report.num_crossing += crosses
        report.add_lengths(group)
        marks = (tie, margin) if votes is None else (tie, margin, votes.shares())
        key = hashlib.sha256(repr((group, *marks)).encode()).digest()
        report.num_duplicates += key in seen
        seen.add(key)
        digest.update(key)
    report.num_used = len(data.groups)
    report.num_ties = sum(data.ties)
    require_rows(report)
    return replace(data, fingerprint=digest.hexdigest())


def fit(
    group: Group,
    source: str,
    report: DataReport,
    max_length: int,
    on_too_long: OnTooLong,
    advice: str,
) -> Group | None:
    """Return the group within `max_length`, or None if it is left out, which is counted."""
    num_prompt = len(group.prompt_ids)
    longest = num_prompt + max(len(response) for response in group.response_ids)
    if longest <= max_length:
        return group
    room = max_length - num_prompt
    if on_too_long == "truncate" and room >= 1:
        cut = [list(response[:room]) for response in group.response_ids]
        masks = group.response_loss_mask
        cut_masks = None if masks is None else [list(mask[:room]) for mask in masks]
        kept = Group(group.prompt_ids, cut, cut_masks)
        learned = all(kept.target_positions(number) for number in range(len(cut)))
        if learned and (len(cut) < 2 or cut[0] != cut[1]):
            report.num_truncated += 1
            return kept
    # A row that would have nothing left to train on cannot be truncated.
    how = "error" if on_too_long == "error" else "skip"
    refuse_long(report, source, (longest, max_length), how, advice)
    return None


def refuse(report: DataReport, fault: DataFault, on_bad_row: OnBadRow) -> None:
    """Raise the fault, or count it."""
    if on_bad_row == "error":
        raise fault
    report.faults.append(fault)


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
