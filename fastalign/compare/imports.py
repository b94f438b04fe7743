"""Comparisons that were made elsewhere: with their labels, into the database.

Formats: rows of fastalign and of hh-rlhf (chosen and rejected, or response_a, response_b, label and
votes, or what `compare export --details` wrote), Argilla's records and Label Studio's tasks.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalign.compare.pairs import compared_pair
from fastalign.compare.store import NewPair, NewVote, Store, Verdict
from fastalign.data.columns import row_kind
from fastalign.data.examples import row_votes
from fastalign.data.readers.row import DataFault, Row, show, show_names
from fastalign.data.readers.rows import read_rows

# Names that annotation projects give to the two answers, and to the verdicts on them.
SIDES = (
    ("response_a", "response_b"),
    ("response1", "response2"),
    ("response_1", "response_2"),
    ("response-1", "response-2"),
    ("answer1", "answer2"),
    ("answer_a", "answer_b"),
    ("completion_a", "completion_b"),
    ("text1", "text2"),
    ("left", "right"),
)
PROMPTS = ("prompt", "instruction", "question", "query", "input")
WORDS: dict[str, Verdict] = {
    **dict.fromkeys(("a", "left", "1", "first", "response_a", "answer_a", "A is better"), "a"),
    **dict.fromkeys(("b", "right", "2", "second", "response_b", "answer_b", "B is better"), "b"),
    **dict.fromkeys(("tie", "0", "equal", "same", "both", "both_good", "draw"), "tie"),
    **dict.fromkeys(("both_bad", "neither", "none", "bad"), "both_bad"),
}
for _first, _second in SIDES:
    WORDS |= {_first: "a", _second: "b"}
SWAPPED: dict[Verdict, Verdict] = {"a": "b", "b": "a"}


@dataclass(frozen=True)
class Imported:
    """A pair with the verdicts of others on it: names of annotators and what they found."""

    pair: NewPair
    verdicts: list[tuple[str, Verdict]]


def read_imported(source: str, annotator: str) -> Iterator[Imported]:
    """Yield the comparisons of a file, whatever tool wrote it.

    Votes without names are those of `annotator 1`, `annotator 2` and so on.

    Raises:
        DataFault: if a row is of none of the formats, or faulty.
    """
    name = Path(source).name or source
    for row in read_rows(source, None, []):
        if isinstance(row, DataFault):
            raise row
        yield imported_row(row, name, annotator)


def imported_row(row: Row, source: str, annotator: str) -> Imported:
    """Return the comparison of a row of any of the formats."""
    if isinstance(row.values.get("annotations"), list):
        return label_studio_row(row, source)
    if "responses" in row.values or "fields" in row.values or has_argilla_columns(row):
        return argilla_row(row, source)
    row_kind(row)
    return own_row(row, source, annotator)


def own_row(row: Row, source: str, annotator: str) -> Imported:
    """Return the comparison of a row in the columns that the trainers read."""
    pair = compared_pair(row, source)
    given = row.values.get("verdicts")
    if isinstance(given, list):
        named = [vote for vote in given if isinstance(vote, dict) and "annotator" in vote]
        found = [(str(v["annotator"]), word(row, "verdicts", v.get("verdict"))) for v in named]
        return Imported(pair, one_each(found))
    label = row.values.get("label") if "response_a" in row.values else "a"
    verdicts: list[Verdict] = []
    if votes := row_votes(row):
        counts: dict[Verdict, float] = {"a": votes.a, "b": votes.b, "tie": votes.tie}
        for side, count in counts.items():
            if count != int(count):
                problem = f"{side}: expected a whole number of votes, got {count:g}"
                raise DataFault(row.where, problem, "votes")
            verdicts += [side] * int(count)
    elif label is not None:
        verdicts = [word(row, "label", label)]
    return Imported(pair, [(f"{annotator} {n}", v) for n, v in enumerate(verdicts, 1)])


def word(row: Row, column: str, value: object) -> Verdict:
    """Return the verdict that a label means."""
    text = str(value).strip()
    found = WORDS.get(text) or WORDS.get(text.lower())
    if found is None:
        known = ", ".join(list(WORDS)[:4])
        raise DataFault(row.where, f"expected a verdict such as {known}, got {show(value)}", column)
    return found


def sides_of(row: Row, fields: Mapping[str, Any], column: str) -> tuple[Any, Any, Any]:
    """Return the prompt and the two answers among a record's fields."""
    prompt = next((fields[name] for name in PROMPTS if fields.get(name)), None)
    for first, second in SIDES:
        if fields.get(first) and fields.get(second) and prompt:
            return prompt, fields[first], fields[second]
    found = show_names(dict(fields))
    names = ", ".join(" and ".join(pair) for pair in SIDES[:3])
    problem = f"expected a field {' or '.join(PROMPTS[:3])} and two answers ({names}), got {found}"
    raise DataFault(row.where, problem, column)


def checked_pair(row: Row, sides: tuple[Any, Any, Any], source: str) -> NewPair:
    """Return the pair of a record's prompt and answers, checked as a trainer's row is."""
    names = ("prompt", "response_a", "response_b")
    return compared_pair(Row(row.where, dict(zip(names, sides, strict=True))), source)


def has_argilla_columns(row: Row) -> bool:
    """Return whether Argilla flattened a record into the row: `question.responses` and the like."""
    return any(name.endswith((".responses", ".responses.users")) for name in row.values)


def argilla_row(row: Row, source: str) -> Imported:
    """Return the comparison of a record that Argilla exported, nested or flattened.

    Nested: `fields`, and `responses` by question, each a list of {value, user_id}. Flattened:
    `NAME.responses` and `NAME.responses.users` beside the fields themselves.
    """
    values = dict(row.values)
    fields = values.get("fields")
    pair = checked_pair(
        row, sides_of(row, fields if isinstance(fields, dict) else values, "fields"), source
    )
    verdicts: list[tuple[str, Verdict]] = []
    nested = values.get("responses")
    if isinstance(nested, dict):
        for answers in nested.values():
            for number, answer in enumerate(answers if isinstance(answers, list) else (), 1):
                if isinstance(answer, dict) and "value" in answer:
                    who = str(answer.get("user_id") or f"argilla {number}")
                    verdicts.append((who, argilla_verdict(row, answer["value"])))
    for name, found in values.items():
        if name.endswith(".responses") and isinstance(found, list):
            users = values.get(f"{name}.users")
            people = users if isinstance(users, list) else []
            for number, value in enumerate(found):
                who = str(people[number]) if number < len(people) else f"argilla {number + 1}"
                verdicts.append((who, argilla_verdict(row, value)))
    return Imported(pair, one_each(verdicts))


def argilla_verdict(row: Row, value: Any) -> Verdict:
    """Return the verdict of a label question, or of a ranking question's ranks."""
    if isinstance(value, list):  # a ranking: {value, rank}, 1 is the best, equal ranks are a tie
        ranks = {
            str(item.get("value")): item.get("rank") for item in value if isinstance(item, dict)
        }
        sides = {WORDS.get(name): rank for name, rank in ranks.items()}
        first, second = sides.get("a"), sides.get("b")
        if not isinstance(first, int) or not isinstance(second, int):
            raise DataFault(row.where, f"expected ranks of both answers, got {show(value)}")
        return "tie" if first == second else "a" if first < second else "b"
    return word(row, "responses", value)


def label_studio_row(row: Row, source: str) -> Imported:
    """Return the comparison of a task of Label Studio's JSON: `data` and `annotations`.

    A result is of type `pairwise` (`selected`: left or right) or `choices`.
    """
    fields = row.values.get("data")
    if not isinstance(fields, dict):
        raise DataFault(row.where, f"expected an object, got {show(fields)}", "data")
    pair = checked_pair(row, sides_of(row, fields, "data"), source)
    verdicts = []
    annotations: Any = row.values["annotations"]
    for number, annotation in enumerate(annotations, 1):
        if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
            continue
        person = annotation.get("completed_by")
        if isinstance(person, dict):
            person = person.get("email") or person.get("id")
        for result in annotation.get("result") or ():
            value = result.get("value", {}) if isinstance(result, dict) else {}
            chosen = value.get("selected") or next(iter(value.get("choices") or ()), None)
            if chosen is not None:
                verdicts.append(
                    (str(person or f"annotator {number}"), word(row, "annotations", chosen))
                )
    return Imported(pair, one_each(verdicts))


def one_each(verdicts: Iterable[tuple[str, Verdict]]) -> list[tuple[str, Verdict]]:
    """Return the last verdict of each annotator."""
    return list(dict(verdicts).items())


def add_imported(store: Store, found: Iterable[Imported]) -> tuple[int, int, Counter[str]]:
    """Add comparisons to the database; a pair, or a person's verdict on it, is added once.

    Returns:
        Numbers of new pairs and of new votes, and of votes by verdict.
    """
    rows = list(found)
    num_pairs = store.add_pairs(row.pair for row in rows)
    places, stored = store.ids_by_digest(), {pair.id: pair for pair in store.pairs()}
    have = {(vote.pair, vote.annotator) for vote in store.votes()}
    people: dict[str, int] = {}
    votes, counts = [], Counter[str]()
    for row in rows:
        pair = places[row.pair.digest]
        # The pair may have been there in the other order.
        swapped = stored[pair].response_a != row.pair.response_a
        for name, verdict in row.verdicts:
            if name not in people:
                people[name] = store.annotator(name, with_key=False).id
            if (pair, people[name]) in have:
                continue
            side = SWAPPED.get(verdict, verdict) if swapped else verdict
            nonce = json.dumps(["import", pair, name])
            counts[side] += 1
            votes.append(NewVote(pair, people[name], "a", side, "import", nonce))
    return num_pairs, sum(vote is not None for vote in store.add_votes(votes)), counts
