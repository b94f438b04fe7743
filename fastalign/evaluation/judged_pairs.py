"""Measures of a reward model: held-out pairs with its rewards and its probabilities."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.evaluation.statistics import estimate, summary

NUM_CALIBRATION_BINS = 10
NUM_LENGTH_BINS = 5


@dataclass(frozen=True)
class JudgedPairs:
    """N pairs under a reward model; unless it is a tie, people preferred the first response.

    Attributes:
        rewards: (N, 2) float64.
        outcomes: (N, 3) float64 log-probabilities of a win of the first, of the second, of a tie.
        tie: (N,) bool.
        lengths: (N, 2) tokens of the responses.
    """

    rewards: Tensor
    outcomes: Tensor
    tie: Tensor
    lengths: Tensor

    def untied(self) -> "JudgedPairs":
        """Return the pairs that are not ties."""
        return JudgedPairs(*(values[~self.tie] for values in vars(self).values()))

    def hits(self) -> Tensor:
        """Return (N,): 1 if the first response has the larger reward, 1/2 if they are equal."""
        return wins(self.rewards[:, 0] - self.rewards[:, 1])

    def win_probability(self) -> Tensor:
        """Return (N,): the probability that the first response wins, given that there is no tie."""
        return torch.sigmoid(self.outcomes[:, 0] - self.outcomes[:, 1])

    def log_likelihood(self) -> Tensor:
        """Return (N,): the log-probability of the label, a win of the first response or a tie."""
        return torch.where(self.tie, self.outcomes[:, 2], self.outcomes[:, 0])


def wins(difference: Tensor) -> Tensor:
    """Return (N,) float64: 1 where a difference is above 0, 1/2 where it is 0."""
    return (difference > 0).double() + (difference == 0).double() / 2


def with_tie_rate(outcomes: Tensor, rate: float) -> Tensor:
    """Return outcomes (N, 3) of a model without ties, given one tie probability for all pairs.

    So a model without ties has a likelihood of tied pairs that can be compared with others.
    """
    p = torch.tensor(rate, dtype=outcomes.dtype)
    untied = outcomes[:, :2] + torch.log1p(-p)
    return torch.cat((untied, p.log().expand(len(outcomes), 1)), dim=1)


def pair_measures(pairs: JudgedPairs) -> dict[str, object]:
    """Compute the measures of a reward model, each mean with its standard error and count.

    Accuracy, margin, calibration and lengths leave out ties; `log_likelihood` is of all pairs, and
    `log_likelihood_untied` of those that are not ties, given that they are not.

    Raises:
        ValueError: if all pairs are ties.
    """
    untied = pairs.untied()
    if not len(untied.tie):
        raise ValueError("data.eval: expected at least one pair that is not a tie, got none")
    hits = untied.hits()
    margin = untied.rewards[:, 0] - untied.rewards[:, 1]
    bins = calibration_bins(untied)
    longer = untied.lengths[:, 0] > untied.lengths[:, 1]
    shorter = untied.lengths[:, 0] < untied.lengths[:, 1]
    measures: dict[str, object] = {
        **summary("accuracy", estimate(hits.tolist())),
        **summary("margin", estimate(margin.tolist())),
        **summary("log_likelihood", estimate(pairs.log_likelihood().tolist())),
        **summary("log_likelihood_untied", estimate(untied.win_probability().log().tolist())),
        "calibration_error": calibration_error(bins),
        "calibration_bins": bins,
        "length_bins": length_bins(untied),
        "num_ties": int(pairs.tie.sum()),
    }
    for name, chosen in (("longer_won", longer), ("shorter_won", shorter)):
        if chosen.any():
            measures |= summary(f"accuracy_{name}", estimate(hits[chosen].tolist()))
    return measures


def calibration_bins(pairs: JudgedPairs) -> list[dict[str, float]]:
    """Group pairs by the probability of the response that the model expects to win.

    Returns:
        For each of the equal bins from 0.5 to 1 that holds pairs: its bounds `low` and `high`,
        `count`, the mean `confidence` and the `accuracy`.
    """
    win = pairs.win_probability()
    confidence = torch.maximum(win, 1.0 - win)
    hits = pairs.hits()
    place = ((confidence - 0.5) * 2 * NUM_CALIBRATION_BINS).long()
    place = place.clamp(max=NUM_CALIBRATION_BINS - 1)
    bins = []
    for number in range(NUM_CALIBRATION_BINS):
        inside = place == number
        if inside.any():
            low = 0.5 + number / (2 * NUM_CALIBRATION_BINS)
            bins.append(
                {
                    "low": low,
                    "high": low + 0.5 / NUM_CALIBRATION_BINS,
                    "count": int(inside.sum()),
                    "confidence": confidence[inside].mean().item(),
                    "accuracy": hits[inside].mean().item(),
                }
            )
    return bins


def calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """Return the expected calibration error of Guo et al. 2017 (arXiv 1706.04599, eq. 5).

    It is the mean over bins of |confidence - accuracy|, weighted by their counts.
    """
    total = sum(b["count"] for b in bins)
    return sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / total


def length_bins(pairs: JudgedPairs) -> list[dict[str, float | None]]:
    """Group pairs by the difference of their responses' lengths, in bins of about equal counts.

    Returns:
        For each bin: its bounds `low` and `high` in tokens, `count`, `share_longer_won` of pairs
        whose lengths differ, and the model's accuracy where the longer response won
        (`accuracy_longer_won`, with `count_longer_won`) and where the shorter one did; None
        without such pairs.
    """
    difference = pairs.lengths[:, 0] - pairs.lengths[:, 1]
    size = difference.abs()
    ordered = size.sort().values
    shares = [n / NUM_LENGTH_BINS for n in range(1, NUM_LENGTH_BINS + 1)]
    # Upper bounds of the bins: a set, since a frequent difference can be the bound of several.
    ends = {int(ordered[math.ceil(share * len(size)) - 1]) for share in shares}
    bins: list[dict[str, float | None]] = []
    low = int(ordered[0])
    for high in sorted(ends):
        inside = (size >= low) & (size <= high)
        sides = {
            "longer_won": pairs.hits()[inside & (difference > 0)],
            "shorter_won": pairs.hits()[inside & (difference < 0)],
        }
        num_longer, num_shorter = (len(hits) for hits in sides.values())
        differing = num_longer + num_shorter
        row: dict[str, float | None] = {"low": low, "high": high, "count": int(inside.sum())}
        row["share_longer_won"] = num_longer / differing if differing else None
        for name, hits in sides.items():
            row[f"accuracy_{name}"] = hits.mean().item() if len(hits) else None
            row[f"count_{name}"] = len(hits)
        bins.append(row)
        low = high + 1
    return bins
