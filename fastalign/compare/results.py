"""The results of a labelling as numbers: agreement, biases, the reward model, and the win rate."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastalign.compare.agreement import (
    alpha_between,
    alpha_of,
    left_won,
    longer_won,
    most_dissent,
    person_measures,
    share_where,
)
from fastalign.compare.export import outcome, votes_by_pair
from fastalign.compare.store import Pair, Store, Vote
from fastalign.data.conversation import json_as_content

NUM_DISSENTING = 20
VERDICTS_OF = {"a": "win", "b": "loss", "tie": "tie"}


def results(store: Store) -> dict[str, Any]:
    """Return all numbers of a database, as JSON can hold them."""
    pairs, votes, annotators = store.pairs(), store.votes(), store.annotators()
    known = {pair.id: pair for pair in pairs}
    by_pair = votes_by_pair(votes)
    given = [vote for found in by_pair.values() for vote in found]
    people = [person_measures(person, votes, known) for person in annotators]
    names = {person.id: person.name for person in annotators}
    found: dict[str, Any] = {
        "num_pairs": sum(not pair.identical for pair in pairs),
        "num_identical_pairs": sum(pair.identical for pair in pairs),
        "num_pairs_with_votes": len(by_pair),
        "num_votes": len(given),
        "verdicts": dict(Counter(vote.verdict for vote in given)),
        **alpha_of(by_pair),
        **share_where(given, known, left_won).as_dict("left"),
        **share_where(given, known, longer_won).as_dict("longer"),
        "annotators": [person for person in people if person is not None],
        "alpha_between": alpha_between(annotators, by_pair),
        "dissent": [
            {"pair": pair, "verdicts": {names[v.annotator]: v.verdict for v in votes_on_it}}
            for pair, votes_on_it in most_dissent(by_pair, NUM_DISSENTING)
        ],
        "fits": store.fits(),
    }
    return found | human_win_rates(pairs, votes)


def human_win_rates(pairs: Sequence[Pair], votes: Sequence[Vote]) -> dict[str, Any]:
    """Return the win rate of the first model, with the keys of `fastalign win-rate`.

    Each vote is a verdict; equal answers are a tie that nobody is asked about. With more than one
    couple of models in the database, `win_rates` has one entry for each.
    """
    couples: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        if pair.model_a is not None and pair.model_b is not None:
            couples.setdefault((pair.model_a, pair.model_b), []).append(pair)
    if not couples:
        return {}
    from fastalign.evaluation.win_rate import AnswerPair, Judged, win_rate  # seconds of imports

    by_pair = votes_by_pair(votes)
    rates = []
    for (model, baseline), members in couples.items():
        judged: list[tuple[AnswerPair, Judged]] = []
        for pair in members:
            texts = (text_of(pair.response_a), text_of(pair.response_b))
            asked = AnswerPair(json_as_content(pair.prompt), *texts, 0)
            verdicts: list[str | None] = [VERDICTS_OF[outcome(v)] for v in by_pair.get(pair.id, ())]
            if pair.identical:
                verdicts = ["tie"]
            judged += [(asked, Judged(verdict, {})) for verdict in verdicts or [None]]
        if any(found.verdict for _, found in judged):
            rate = win_rate(*map(list, zip(*judged, strict=True)))
            rates.append({"model": model, "baseline": baseline, **rate, "num_pairs": len(members)})
    if len(rates) == 1:
        return rates[0]
    return {"win_rates": rates} if rates else {}


def text_of(response: Any) -> str:
    """Return the text of an answer."""
    if isinstance(response, str):
        return response
    return "\n".join(message["content"] for message in response)


def percent(found: dict[str, Any], name: str) -> str | None:
    """Return a share of the results in words, `53 % (43 % to 63 %, 98)`; None if there is none."""
    if found.get(name) is None:
        return None
    low, high, count = (found[f"{name}_{end}"] for end in ("low", "high", "count"))
    return f"{found[name]:.0%} ({low:.0%} to {high:.0%} of {count})"


def win_rate_lines(found: dict[str, Any]) -> list[str]:
    """Return a line for each couple of models."""
    rates = found.get("win_rates") or ([found] if "win_rate" in found else [])
    return [
        f"{rate['model']} against {rate['baseline']}: win rate {rate['win_rate']:.3f} "
        f"({rate['win_rate_low']:.3f} to {rate['win_rate_high']:.3f}; {rate['interval']}): "
        f"{rate['num_wins']} wins, {rate['num_ties']} ties (one half each), {rate['num_losses']} "
        f"losses; {rate['num_undecided']} pairs without a verdict"
        for rate in rates
    ]


def summary_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return names and values of the numbers of everybody, for a table."""
    rows = [
        ("pairs with votes", f"{found['num_pairs_with_votes']} of {found['num_pairs']}"),
        ("votes", str(found["num_votes"])),
        ("verdicts", ", ".join(f"{n} {name}" for name, n in sorted(found["verdicts"].items()))),
    ]
    if found["alpha"] is not None:
        interval = f"{found['alpha_low']:.2f} to {found['alpha_high']:.2f}"
        several = f"{found['alpha_count']} pairs with several votes"
        rows.append(("Krippendorff's alpha", f"{found['alpha']:.2f} ({interval}; {several})"))
    for label, name in (("the left answer won", "left"), ("the longer answer won", "longer")):
        if text := percent(found, name):
            rows.append((label, text))
    if found["fits"]:
        rows += fit_rows(found["fits"][-1])
    return rows


def fit_rows(fit: dict[str, Any]) -> list[tuple[str, str]]:
    """Return names and values of the last fit of the reward model's head."""
    rows = []
    if text := percent(fit, "accuracy"):
        rows.append(("reward model, held-out accuracy", text))
    if fit.get("labels_needed") is not None:
        rows.append(("labels that are still needed, about", str(fit["labels_needed"])))
    return rows


PERSON_COLUMNS = (
    *("annotator", "votes", "skipped", "seconds", "ties", "left won", "longer won"),
    *("same again", "as others"),
)


def person_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the PERSON_COLUMNS of each annotator."""
    names = ("ties", "left", "longer", "same_again", "with_others")
    return [
        (
            str(person["name"]),
            str(person["num_votes"]),
            str(person["num_skipped"]),
            "" if person["median_seconds"] is None else f"{person['median_seconds']:.1f}",
            *(percent(person, name) or "" for name in names),
        )
        for person in found["annotators"]
    ]
