"""Rows of comparisons with their votes, as every trainer of pairs reads them."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from fastalign.compare.store import Annotator, Pair, Vote

BothBad = Literal["tie", "drop"]


def votes_by_pair(votes: Sequence[Vote]) -> dict[int, list[Vote]]:
    """Return each pair's verdicts: one of each annotator, without repetitions and skipped ones."""
    found: dict[int, list[Vote]] = defaultdict(list)
    for vote in votes:
        if vote.decides and vote.chosen_by != "repeat":
            found[vote.pair].append(vote)
    return found


def outcome(vote: Vote) -> str:
    """Return `a`, `b` or `tie`; two bad answers are equally good."""
    return "tie" if vote.verdict == "both_bad" else vote.verdict


def label_of(counts: Counter[str]) -> str:
    """Return the side with more votes than the other and than ties have; otherwise `tie`."""
    for side, other in (("a", "b"), ("b", "a")):
        if counts[side] > max(counts[other], counts["tie"]):
            return side
    return "tie"


def exported_rows(
    pairs: Sequence[Pair],
    votes: Sequence[Vote],
    annotators: Sequence[Annotator],
    *,
    both_bad: BothBad = "tie",
    details: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each pair with votes: prompt, response_a, response_b, label, votes.

    Args:
        pairs: pairs of the database.
        votes: votes of the database.
        annotators: annotators of the database.
        both_bad: count two bad answers as a tie, or leave these votes out.
        details: also write source and models of the pair, and each vote.
    """
    names = {person.id: person.name for person in annotators}
    found = votes_by_pair(votes)
    for pair in pairs:
        given = [v for v in found[pair.id] if both_bad == "tie" or v.verdict != "both_bad"]
        if not given or pair.identical:
            continue
        counts = Counter(map(outcome, given))
        row = {
            "prompt": pair.prompt,
            "response_a": pair.response_a,
            "response_b": pair.response_b,
            "label": label_of(counts),
            "votes": {side: counts[side] for side in ("a", "b", "tie")},
        }
        if details:
            row["source"] = pair.source
            row["models"] = [pair.model_a, pair.model_b]
            row["verdicts"] = [vote_details(vote, names[vote.annotator]) for vote in given]
        yield row


def vote_details(vote: Vote, name: str) -> dict[str, Any]:
    """Return what is known of a vote."""
    return {
        "annotator": name,
        "verdict": vote.verdict,
        "clearly": vote.strength == 2,
        "shown_left": vote.shown_left,
        "chosen_by": vote.chosen_by,
        "note": vote.note,
        "seconds": round(vote.seconds, 3),
        "time": vote.time,
    }
