"""Pairs to compare: from samples of `fastalign generate`, rows of comparisons, or two models."""

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign.compare.store import NewPair
from fastalign.data.columns import row_kind
from fastalign.data.conversation import content, content_as_json
from fastalign.data.examples import Content, PreferenceExample, parse
from fastalign.data.readers.row import DataFault, Row
from fastalign.data.readers.rows import read_rows

if TYPE_CHECKING:
    from fastalign.evaluation.win_rate import AnswerPair


def read_pairs(source: str, per_prompt: int, seed: int) -> tuple[list[NewPair], list[str]]:
    """Read pairs of answers from a file of samples or of comparisons.

    Of samples (`prompt`, `completion`), each prompt's distinct answers are paired, at most
    `per_prompt` pairs of a prompt, drawn at random. Labels and votes of comparisons are not read.

    Returns:
        The pairs, and lines on what gave none.

    Raises:
        DataFault: if a row is faulty, or the rows have other columns.
        ValueError: if there is no pair.
    """
    answers: dict[Content, dict[str, None]] = {}
    pairs: list[NewPair] = []
    num_empty = num_same = 0
    name = Path(source).name or source
    for row in read_rows(source, None, []):
        if isinstance(row, DataFault):
            raise row
        if {"prompt", "completion"} <= row.values.keys():
            completion = row.values["completion"]
            if not isinstance(completion, str):
                raise DataFault(row.where, "expected text", "completion")
            found = answers.setdefault(content(row, "prompt"), {})
            num_empty += not completion.strip()
            num_same += completion in found
            if completion.strip():
                found[completion] = None
        else:
            pairs.append(compared_pair(row, name))
    alone = 0
    for prompt, texts in answers.items():
        drawn = drawn_pairs(list(texts), per_prompt, random.Random(f"{seed}/{prompt!r}"))
        alone += not drawn
        pairs += [answer_pair(prompt, first, second, name) for first, second in drawn]
    lines = [
        f"{source}: {number} {what}"
        for number, what in (
            (num_empty, "empty answers left out"),
            (num_same, "answers that a prompt has twice, once each"),
            (alone, "prompts with fewer than two distinct answers left out"),
        )
        if number
    ]
    if not pairs:
        raise ValueError(
            f"{source}: expected two distinct answers of a prompt, found none; sample more of each "
            "(fastalign generate --sampling.num-samples 4)"
        )
    return pairs, lines


def drawn_pairs(texts: Sequence[str], most: int, generator: random.Random) -> list[tuple[str, str]]:
    """Return at most this many pairs of different texts, each in a random order."""
    found = list(combinations(texts, 2))
    if len(found) > most:
        found = generator.sample(found, most)
    return [(b, a) if generator.random() < 0.5 else (a, b) for a, b in found]


def response_of(prompt: Content, text: str) -> Any:
    """Return an answer as JSON of the prompt's kind: text, or a list of one message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def answer_pair(
    prompt: Content,
    first: str,
    second: str,
    source: str,
    models: tuple[str | None, str | None] = (None, None),
) -> NewPair:
    """Return the pair of two answers that were sampled."""
    sides = response_of(prompt, first), response_of(prompt, second)
    return NewPair(content_as_json(prompt), *sides, source, *models)


def preference_of(row: Row) -> PreferenceExample:
    """Return a row of comparisons, whose label and votes may be missing.

    Raises:
        DataFault: if it is something else, or faulty.
    """
    values: Mapping[str, object] = row.values
    if row_kind(row) != "preference":
        raise DataFault(row.where, "expected samples (prompt, completion) or pairs of responses")
    if "response_a" in values and values.get("label") is None:
        row = Row(row.where, {**values, "label": "tie", "votes": None}, row.textual)
    example = parse(row, "preference")
    assert isinstance(example, PreferenceExample)
    return example


def compared_pair(row: Row, source: str) -> NewPair:
    """Return the pair of a row of comparisons, its responses in the order of the file."""
    example = preference_of(row)
    first, second = example.chosen, example.rejected
    if row.values.get("label") == "b":
        first, second = second, first
    prompt, first, second = map(content_as_json, (example.prompt, first, second))
    return NewPair(prompt, first, second, source)


def model_pairs(pairs: Iterable["AnswerPair"], models: tuple[str, str]) -> list[NewPair]:
    """Return the pairs of two models' answers; equal answers stay, and nobody is asked about them.

    Raises:
        ValueError: if the models have the same name.
    """
    if models[0] == models[1]:
        raise ValueError(f"b: expected another model than {models[0]}, got the same")
    source = f"{models[0]} and {models[1]}"
    return [answer_pair(p.prompt, p.model, p.baseline, source, models) for p in pairs]
