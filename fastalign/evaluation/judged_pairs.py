"""What a reward model is judged by: held-out pairs with its rewards and its probabilities."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.evaluation.statistics import Estimate, estimate, summary

NUM_CALIBRATION_BINS = 10
NUM_LENGTH_BINS = 5


@dataclass(frozen=True)
class JudgedPairs:
    """N pairs under a reward model; where it is no tie, people preferred the first response.

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
        """Those that are no ties."""
        keep = ~self.tie
        return JudgedPairs(
            self.rewards[keep], self.outcomes[keep], self.tie[keep], self.lengths[keep]
        )

    def hits(self) -> Tensor:
        """(N,) 1 where the first response has the larger reward, one half where they are equal."""
        difference = self.rewards[:, 0] - self.rewards[:, 1]
        return (difference > 0).double() + (difference == 0).double() / 2

    def win_probability(self) -> Tensor:
        """(N,) that the first response wins, given that one of the two does."""
        return torch.sigmoid(self.outcomes[:, 0] - self.outcomes[:, 1])

    def log_likelihood(self) -> Tensor:
        """(N,) log-probability of what people said: a win, or a tie."""
        return torch.where(self.tie, self.outcomes[:, 2], self.outcomes[:, 0])


def with_tie_rate(outcomes: Tensor, rate: float) -> Tensor:
    """Outcomes (N, 3) of a model without ties, to which each pair ties with the same probability.

    So a model that knows no ties has a likelihood of pairs that are: the best that one number can.
    """
    p = torch.tensor(rate, dtype=outcomes.dtype)
    untied = outcomes[:, :2] + torch.log1p(-p)
    return torch.cat((untied, p.log().expand(len(outcomes), 1)), dim=1)


def pair_measures(pairs: JudgedPairs) -> dict[str, object]:
    """Measures of a reward model, each with its standard error and count; ties are no hits.

    Accuracy, margin, calibration and lengths are of pairs that are no ties; `log_likelihood` is of
    all pairs, `log_likelihood_untied` of the others given that they are no ties.

    Raises:
        ValueError: no pair that is no tie.
    """
    untied = pairs.untied()
    if not len(untied.tie):
        raise ValueError("data.eval: expected at least one pair that is no tie, got none")
    hits = untied.hits()
    margin = untied.rewards[:, 0] - untied.rewards[:, 1]
    bins = calibration_bins(untied)
    longer = untied.lengths[:, 0] > untied.lengths[:, 1]
    shorter = untied.lengths[:, 0] < untied.lengths[:, 1]
    measures: dict[str, object] = {
        **summary("accuracy", of(hits)),
        **summary("margin", of(margin)),
        **summary("log_likelihood", of(pairs.log_likelihood())),
        **summary("log_likelihood_untied", of(untied.win_probability().log())),
        "calibration_error": calibration_error(bins),
        "calibration_bins": bins,
        "length_bins": length_bins(untied),
        "num_ties": int(pairs.tie.sum()),
    }
    for name, chosen in (("longer_won", longer), ("shorter_won", shorter)):
        if chosen.any():
            measures |= summary(f"accuracy_{name}", of(hits[chosen]))
    return measures


def of(values: Tensor) -> Estimate:
    """The mean of values (N,)."""
    return estimate(values.tolist())


def calibration_bins(pairs: JudgedPairs) -> list[dict[str, float]]:
    """Pairs by the probability of the response that the model expects to win, in equal steps.

    Returns:
        For each step from 0.5 to 1 that holds pairs: its bounds `low` and `high`, `count`, the mean
        `confidence` and the `accuracy`.
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
    """Mean distance of confidence and accuracy, over bins by their counts.

    The expected calibration error of Guo et al. 2017 (arXiv 1706.04599, eq. 5).
    """
    total = sum(b["count"] for b in bins)
    return sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / total


def length_bins(pairs: JudgedPairs) -> list[dict[str, float | None]]:
    """Pairs by how far apart the responses' lengths are, about as many in each bin.

    Returns:
        For each bin: its bounds `low` and `high` in tokens, `count`, `share_longer_won` of pairs
        whose lengths differ, and how often the model is right where the longer response won
        (`accuracy_longer_won`, with `count_longer_won`) and where the shorter one did; None where
        there are none.
    """
    difference = pairs.lengths[:, 0] - pairs.lengths[:, 1]
    size = difference.abs()
    ordered = size.sort().values
    shares = [n / NUM_LENGTH_BINS for n in range(1, NUM_LENGTH_BINS + 1)]
    # The largest of each bin; bins that one common length would leave empty are merged.
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
