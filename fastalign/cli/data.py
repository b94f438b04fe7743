"""`fastalign data check FILE ...`: count rows and lengths, and list every fault of each file."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastalign.cli.config_parse import parse_flags
from fastalign.data.examples import (
    Content,
    Example,
    PreferenceExample,
    PromptExample,
    SFTExample,
    UnpairedExample,
)
from fastalign.data.read import read_examples
from fastalign.data.readers.row import DataFault
from fastalign.data.report import DataReport
from fastalign.data_sources import weighted_source

if TYPE_CHECKING:
    from fastalign.data.tokenise import Encoder


@dataclass(frozen=True)
class CheckData:
    """Handling of rows that cannot be used."""

    on_bad_row: Literal["error", "skip"] = "error"
    """Exit with code 2 if there are bad rows, or skip and count them as training would."""


@dataclass(frozen=True)
class CheckConfig:
    """Read every row as training would and print every fault."""

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """File (.jsonl, .ndjson, .json, .csv, .tsv, each also .gz, .bz2, .zst; .parquet), folder or hub
    name; a weight behind it, as of data.train, is left out."""
    kind: Literal["auto", "sft", "preference", "unpaired", "prompt"] = "auto"
    """Kind of the rows; auto decides by the columns of the first valid row."""
    tokenizer: str | None = None
    """Model folder or hub name to count tokens and apply the chat template."""
    max_length: int | None = None
    """Count rows with more tokens than this; requires a tokenizer."""
    show: int = 1
    """Print what this many of the first rows become under the tokenizer: prompts, and what of the
    rest is learned."""
    data: CheckData = CheckData()


def check(config: CheckConfig) -> DataReport:
    """Read the source to its end, or to a fault after which no row can be trusted."""
    if config.max_length is not None and config.tokenizer is None:
        raise ValueError("max-length: counting tokens needs --tokenizer, got none")
    encoder = None if config.tokenizer is None else load_encoder(config.tokenizer)
    source = weighted_source(config.file).path
    report = DataReport(source, unit="characters" if encoder is None else "tokens")
    kind = None if config.kind == "auto" else config.kind
    try:
        for example in read_examples(source, kind, report, on_bad_row="skip"):
            try:
                if encoder is not None and report.num_used < config.show:
                    print("\n".join(shown_example(encoder, example)))
                long = measure(report, encoder, example, config.max_length)
            except DataFault as fault:
                report.faults.append(fault)
                continue
            if long:
                report.num_too_long += 1
                continue
            report.num_used += 1
            report.num_ties += isinstance(example, PreferenceExample) and example.tie
            report.forms[example.form] += 1
    except DataFault as fault:
        report.faults.append(
            DataFault(fault.where, f"{fault.problem} (stopped here)", fault.column)
        )
    return report


def load_encoder(path: str) -> "Encoder":
    """Return the tokenisation by a model's tokenizer; its libraries take seconds to import."""
    from fastalign.data.tokenise import Encoder
    from fastalign.data.tokenizer import load_tokenizer

    return Encoder(load_tokenizer(path))


def count_characters(report: DataReport, example: Example) -> None:
    """Add the example's lengths in characters to the report."""
    prompt, responses = example.prompt, []
    if isinstance(example, SFTExample):
        responses = [example.completion]
    elif isinstance(example, PreferenceExample):
        responses = [example.chosen, example.rejected]
    if prompt is not None:
        report.prompt_lengths.append(num_characters(prompt))
    report.response_lengths.extend(map(num_characters, responses))


def num_characters(content: Content) -> int:
    """Return the number of characters of a text or of a conversation's messages."""
    return len(content) if isinstance(content, str) else sum(len(m.content) for m in content)


def measure(
    report: DataReport, encoder: "Encoder | None", example: Example, max_length: int | None
) -> bool:
    """Add the example's lengths to the report, and return whether it has too many tokens."""
    if encoder is None:
        count_characters(report, example)
        return False
    if isinstance(example, PromptExample):
        length = len(encoder.prompt(example))
        if max_length is not None and length > max_length:
            return True
        report.prompt_lengths.append(length)
        return False
    groups = encoder.row(example)
    num_kept = 0
    for group, crosses in groups:
        longest = max(len(response) for response in group.response_ids)
        if max_length is None or len(group.prompt_ids) + longest <= max_length:
            num_kept += 1
            report.num_crossing += crosses
            report.add_lengths(group)
    if len(groups) > 1 and num_kept:
        report.num_split += 1
        report.num_examples_of_split += num_kept
        report.num_too_long += len(groups) - num_kept
    return num_kept == 0


def shown_example(encoder: "Encoder", example: Example) -> list[str]:
    """Return lines of what a row becomes: each prompt, and what of the rest is learned."""
    if isinstance(example, PromptExample):
        return [example.source, f"  prompt   {shown_text(encoder.text(encoder.prompt(example)))}"]
    names = ("learned",) if isinstance(example, SFTExample) else ("chosen", "rejected")
    if isinstance(example, UnpairedExample):
        names = ("good",) if example.desirable else ("bad",)
    lines = []
    for group, _ in encoder.row(example):
        lines += [example.source, f"  prompt   {shown_text(encoder.text(group.prompt_ids))}"]
        for number, name in enumerate(names):
            targets = set(group.target_positions(number))
            ids = group.response_ids[number]
            marked = [(place in targets, token) for place, token in enumerate(ids)]
            for learned, part in groupby(marked, itemgetter(0)):
                text = shown_text(encoder.text([token for _, token in part]))
                lines.append(f"  {name if learned else 'context':<8} {text}")
    return lines


def shown_text(text: str) -> str:
    """Return a text in one line of at most about 1,000 characters, its middle left out."""
    return repr(text if len(text) <= 1000 else f"{text[:500]} [...] {text[-500:]}")


def main(argv: Sequence[str]) -> int:
    """Run the command; return 0 if all rows are usable or bad ones may be skipped, otherwise 2.

    Of several files each is checked by itself.
    """
    if argv[:1] != ["check"]:
        raise ValueError(f"expected `fastalign data check FILE`, got {argv[0]}")
    files = list(takewhile(lambda word: not word.startswith("-"), argv[1:]))
    flags = argv[1 + len(files) :]
    configs = [
        parse_flags(CheckConfig, [*file, *flags], "fastalign data check")
        for file in ([[file] for file in files] or [[]])
    ]
    return max(map(check_and_print, configs))


def check_and_print(config: CheckConfig) -> int:
    """Print the faults and the counts of one source; return the exit code."""
    if not Path(config.file).name:
        raise ValueError("expected a file, a folder or a hub name, got an empty name")
    report = check(config)
    skip = config.data.on_bad_row == "skip"
    for fault in report.faults:
        print(f"{'skipped: ' if skip else ''}{fault}", file=sys.stderr)
    print("\n".join(report.lines()))
    usable = report.num_used > 0
    return 0 if usable and (skip or not report.faults) else 2
