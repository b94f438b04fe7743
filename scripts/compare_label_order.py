"""Count the labels that a chosen and a random order of questions need, on comparisons with labels.

The labels of a file stand for a person who answers. In steps, as `fastalign compare --reward` does
it, pairs are labelled, the head is fitted, and the pairs that are left are ranked by it. After each
step the head is tested on held-out pairs, until all pairs are labelled.

    python scripts/compare_label_order.py MODEL --pool pool.jsonl --test test.jsonl --out out.json
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastalign.compare.features import PairFeatures, pair_features
from fastalign.compare.head import Head, Labels, fit_all, log_likelihood, ranking
from fastalign.compare.imports import imported_row
from fastalign.compare.store import Pair
from fastalign.compute import Compute, find_device
from fastalign.data.readers.row import DataFault
from fastalign.data.readers.rows import read_rows
from fastalign.evaluation.statistics import estimate
from fastalign.written_files import check_file, write_file

OUTCOMES = ("a", "b", "tie")
RANDOM_SHARE = 0.2  # as of --choice.random-share


def labelled_pairs(path: str, first: int) -> tuple[list[Pair], list[str]]:
    """Return the pairs of a file, numbered from `first`, and their labels."""
    pairs, labels = [], []
    for row in read_rows(path, None, []):
        if isinstance(row, DataFault):
            raise row
        found = imported_row(row, path, "label")
        pairs.append(Pair(**vars(found.pair), id=first + len(pairs)))
        labels.append(found.verdicts[0][1])
    return pairs, labels


def votes_of(labels: list[str]) -> torch.Tensor:
    """Return one vote for each label, (N, 3)."""
    return torch.tensor([[float(label == name) for name in OUTCOMES] for label in labels]).double()


def tested(head: Head, features: PairFeatures, test: Labels) -> dict[str, float]:
    """Return accuracy on the held-out pairs that are no ties, and log-likelihood of all."""
    outcomes = head.outcomes(features, test.places)
    untied = test.votes[:, 2] == 0
    right = ((outcomes[:, 0] > outcomes[:, 1]) == (test.votes[:, 0] > test.votes[:, 1]))[untied]
    likely = log_likelihood(outcomes, test).mean().item()
    return {"accuracy": right.double().mean().item(), "log_likelihood": likely}


def curve(
    features: PairFeatures, pool: Labels, test: Labels, *, chosen: bool, every: int, seed: int
) -> list[dict[str, float]]:
    """Return the tests after every `every` labels, until the pool is empty."""
    generator = torch.Generator().manual_seed(seed)
    at_random = torch.randperm(len(pool), generator=generator).tolist()
    ids = torch.tensor(features.ids)[pool.places].tolist()
    place_of = {pair: place for place, pair in enumerate(ids)}
    taken: dict[int, bool] = {}  # place in the pool: drawn at random
    order: list[int] = []
    steps = []
    while len(taken) < len(pool):
        for _ in range(min(every, len(pool) - len(taken))):
            by_model = order and torch.rand((), generator=generator).item() >= RANDOM_SHARE
            source = order if by_model else at_random
            place = next(place for place in source if place not in taken)
            taken[place] = not by_model
        index = torch.tensor(list(taken))
        labels = Labels(pool.places[index], pool.votes[index], torch.tensor(list(taken.values())))
        fit = fit_all(features, labels, seed)
        steps.append({"num_labels": len(taken), **tested(fit.head, features, test)})
        if chosen:
            done = [ids[place] for place in taken]
            ranked = ranking(features, fit.informative, done)
            order = [place_of[pair] for pair in ranked if pair in place_of]
    return steps


def needed(steps: list[dict[str, float]], measure: str, goal: float) -> float:
    """Return the labels after which a measure is at the goal for the first time, interpolated."""
    before = {"num_labels": 0.0, measure: float("-inf")}
    for step in steps:
        if step[measure] >= goal:
            if before[measure] == float("-inf"):
                return step["num_labels"]
            share = (goal - before[measure]) / (step[measure] - before[measure])
            return before["num_labels"] + share * (step["num_labels"] - before["num_labels"])
        before = step
    return float("inf")


def summarise(curves: dict[str, list[list[dict[str, float]]]], below: dict[str, float]) -> Any:
    """Return labels needed by each order to come within `below` of what all labels give."""
    found: dict[str, Any] = {}
    for measure, margin in below.items():
        whole = estimate([steps[-1][measure] for runs in curves.values() for steps in runs]).mean
        found[measure] = {"all_labels": whole, "goal": whole - margin}
        for name, runs in curves.items():
            numbers = [needed(steps, measure, whole - margin) for steps in runs]
            value = estimate(numbers)
            found[measure][name] = {"labels": value.mean, "labels_se": value.standard_error}
            found[measure][name]["each"] = numbers
    return found


def main() -> int:
    """Run both orders with each seed; print the labels needed and write all curves."""
    parser = argparse.ArgumentParser(description="Chosen against random order of comparisons.")
    parser.add_argument("model", help="reward model, or a causal model")
    parser.add_argument("--pool", required=True, help="labelled pairs to ask about")
    parser.add_argument("--test", required=True, help="labelled pairs to test on")
    parser.add_argument("--out", required=True, help="file (.json) to write")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=50, help="labels between two fits")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    out = check_file("--out", options.out, overwrite=options.overwrite)
    pool_pairs, pool_labels = labelled_pairs(options.pool, 1)
    test_pairs, test_labels = labelled_pairs(options.test, 1 + len(pool_pairs))
    begin = time.perf_counter()
    pairs = pool_pairs + test_pairs
    features = pair_features(options.model, pairs, Compute(find_device("auto")))
    print(f"{len(features.ids)} pairs read in {time.perf_counter() - begin:.0f} s")
    votes = votes_of(pool_labels + test_labels)[torch.tensor(features.ids) - 1]
    in_pool = torch.tensor(features.ids) <= len(pool_pairs)
    everywhere = Labels(torch.arange(len(votes)), votes, torch.ones(len(votes), dtype=torch.bool))
    pool, test = everywhere.at(in_pool), everywhere.at(~in_pool)
    curves: dict[str, list[list[dict[str, float]]]] = {"random": [], "chosen": []}
    for seed in range(options.seeds):
        for name, runs in curves.items():
            steps = curve(
                features, pool, test, chosen=name == "chosen", every=options.every, seed=seed
            )
            runs.append(steps)
            print(f"seed {seed}, {name}: {steps[-1]}")
    found = summarise(curves, {"accuracy": 0.01, "log_likelihood": 0.01})
    for measure, row in found.items():
        for name in curves:
            print(
                f"{measure} {row['goal']:.3f} (all labels: {row['all_labels']:.3f}), {name} order: "
                f"{row[name]['labels']:.0f} +- {row[name]['labels_se']:.0f} labels"
            )
    result = {"model": Path(options.model).name, "num_pool": len(pool), "num_test": len(test)}
    text = json.dumps({**result, "needed": found, "curves": curves}, indent=1)
    write_file(out, text + "\n", overwrite=options.overwrite)
    return 0


if __name__ == "__main__":
    sys.exit(main())
