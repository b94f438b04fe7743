"""Agreement between annotators and with themselves, and their biases, each with its interval."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np

from fastalign.compare.export import outcome, votes_by_pair
from fastalign.compare.store import Annotator, Pair, Vote
from fastalign.evaluation.statistics import wilson_interval

OUTCOMES = ("a", "b", "tie")
NUM_RESAMPLES = 1000
# Fewer common pairs say nothing about two people.
LEAST_COMMON = 5


@dataclass(frozen=True)
class Share:
    """A share of cases with Wilson's 95 % interval; all NaN without cases."""

    share: float
    low: float
    high: float
    count: int

    def as_dict(self, name: str) -> dict[str, float | int | None]:
        """Return `name`, `name_low`, `name_high` and `name_count`, None for NaN."""
        values = {"": self.share, "_low": self.low, "_high": self.high}
        found: dict[str, float | int | None] = {
            f"{name}{end}": None if math.isnan(value) else value for end, value in values.items()
        }
        return found | {f"{name}_count": self.count}


def share_of(cases: Sequence[bool]) -> Share:
    """Return the share of true cases."""
    if not cases:
        return Share(math.nan, math.nan, math.nan, 0)
    share = sum(cases) / len(cases)
    return Share(share, *wilson_interval(share, len(cases)), len(cases))


def outcome_counts(by_pair: Mapping[int, Sequence[Vote]]) -> np.ndarray[Any, Any]:
    """Return the number of votes for a, for b and for a tie of each pair with two votes, (N, 3)."""
    rows = [Counter(map(outcome, votes)) for votes in by_pair.values() if len(votes) > 1]
    return np.array([[row[name] for name in OUTCOMES] for row in rows], dtype=int).reshape(-1, 3)


def nominal_alpha(counts: np.ndarray[Any, Any]) -> float:
    """Return Krippendorff's alpha of the pairs' counts (N, 3) of a, b and tie.

    The order of the two answers is arbitrary, so each pair also counts with a and b exchanged:
    without that, alpha would depend on which answer was written first. NaN if nothing varies.
    """
    import krippendorff

    both = np.concatenate([counts, counts[:, [1, 0, 2]]])
    if len(counts) == 0 or (both.sum(0) > 0).sum() < 2:
        return math.nan
    return float(krippendorff.alpha(value_counts=both, level_of_measurement="nominal"))


def alpha_of(by_pair: Mapping[int, Sequence[Vote]], *, seed: int = 0) -> dict[str, Any]:
    """Return Krippendorff's alpha with a percentile bootstrap interval over pairs."""
    counts = outcome_counts(by_pair)
    value = nominal_alpha(counts)
    found: dict[str, Any] = {"alpha": value, "alpha_count": len(counts)}
    if math.isnan(value):
        return found | {"alpha": None, "alpha_low": None, "alpha_high": None}
    generator = np.random.default_rng(seed)
    drawn = [
        nominal_alpha(counts[generator.integers(len(counts), size=len(counts))])
        for _ in range(NUM_RESAMPLES)
    ]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return found | {"alpha_low": float(low), "alpha_high": float(high)}


def length_of(response: Any) -> int:
    """Return the number of characters of an answer."""
    if isinstance(response, str):
        return len(response)
    return sum(len(message["content"]) for message in response)


def left_won(vote: Vote, pair: Pair) -> bool | None:
    """Return whether the answer on the left won; None for ties, and where sides are unknown."""
    if vote.chosen_by == "import" or outcome(vote) == "tie":
        return None
    return vote.verdict == vote.shown_left


def longer_won(vote: Vote, pair: Pair) -> bool | None:
    """Return whether the longer answer won; None for ties and answers of one length."""
    difference = length_of(pair.response_a) - length_of(pair.response_b)
    if outcome(vote) == "tie" or not difference:
        return None
    return (vote.verdict == "a") == (difference > 0)


def share_where(
    votes: Sequence[Vote], pairs: Mapping[int, Pair], said: Callable[[Vote, Pair], bool | None]
) -> Share:
    """Return the share of votes of which something is true, of those that can say it."""
    found = [said(vote, pairs[vote.pair]) for vote in votes]
    return share_of([value for value in found if value is not None])


def person_measures(
    person: Annotator, votes: Sequence[Vote], pairs: Mapping[int, Pair]
) -> dict[str, Any] | None:
    """Return an annotator's numbers of `votes`, those of everybody; None without any vote."""
    own = [v for v in votes if v.annotator == person.id and v.decides]
    first = {v.pair: v for v in own if v.chosen_by != "repeat"}
    if not first:
        return None
    given = list(first.values())
    again = [v for v in own if v.chosen_by == "repeat" and v.pair in first]
    others = votes_by_pair([v for v in votes if v.annotator != person.id])
    with_others = [outcome(v) == outcome(o) for v in given for o in others.get(v.pair, ())]
    seconds = [v.seconds for v in given if v.seconds > 0]
    return {
        "name": person.name,
        "num_votes": len(given),
        "num_skipped": sum(v.annotator == person.id and not v.decides for v in votes),
        "median_seconds": median(seconds) if seconds else None,
        **share_of([v.verdict in ("tie", "both_bad") for v in given]).as_dict("ties"),
        **share_where(given, pairs, left_won).as_dict("left"),
        **share_where(given, pairs, longer_won).as_dict("longer"),
        **share_of([v.verdict == first[v.pair].verdict for v in again]).as_dict("same_again"),
        **share_of(with_others).as_dict("with_others"),
    }


def alpha_between(
    annotators: Sequence[Annotator], by_pair: Mapping[int, Sequence[Vote]]
) -> list[dict[str, Any]]:
    """Return alpha of each two annotators with at least LEAST_COMMON pairs in common."""
    common: dict[tuple[int, int], dict[int, list[Vote]]] = defaultdict(dict)
    for pair, votes in by_pair.items():
        for first, second in combinations(sorted(votes, key=lambda v: v.annotator), 2):
            common[first.annotator, second.annotator][pair] = [first, second]
    names = {person.id: person.name for person in annotators}
    rows = []
    for (first_id, second_id), found in sorted(common.items()):
        value = nominal_alpha(outcome_counts(found))
        if len(found) >= LEAST_COMMON and not math.isnan(value):
            people = [names[first_id], names[second_id]]
            rows.append({"annotators": people, "alpha": value, "count": len(found)})
    return rows


def dissent(votes: Sequence[Vote]) -> float:
    """Return the entropy of a pair's votes for a, b and a tie, in nats."""
    counts = Counter(map(outcome, votes))
    shares = [count / len(votes) for count in counts.values()]
    return -math.fsum(share * math.log(share) for share in shares)


def most_dissent(
    by_pair: Mapping[int, Sequence[Vote]], most: int
) -> list[tuple[int, Sequence[Vote]]]:
    """Return the pairs that people disagree about most, for a second look."""
    found = [(pair, votes) for pair, votes in by_pair.items() if dissent(votes) > 0]
    found.sort(key=lambda item: (-dissent(item[1]), -len(item[1]), item[0]))
    return found[:most]
