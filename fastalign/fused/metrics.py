"""Means from the summed metrics of a step."""

from torch import Tensor

# Means over target tokens, beside `policy/...` and `val/...`.
OVER_TOKENS = ("entropy", "mean_token_accuracy", "cross_entropy", "z_loss", "jsd")


def is_count(name: str) -> bool:
    """Return True if a metric counts something: it is summed, never averaged."""
    return name.rpartition("/")[2].startswith("num_")


def metric_means(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn the summed metrics of a step into means, under the same names; counts stay counts.

    A count is named `num_...`, perhaps after a slash, as `policy/num_clamped`.
    Means are over pairs, but those of OVER_TOKENS, `policy/*` and `val/*` over tokens,
    `logits/chosen` and `logits/rejected` over that side's, and `rewards/accuracies`, and a reward
    model's `accuracy` and `margin`, over pairs that are not ties. Without pairs `.../chosen` and
    `.../rejected` are over good and bad responses. A mean over nothing is 0.
    Extremes (`min_...`, `max_...`) stay what they are, and `router_loss`, a weighted sum.
    """
    counts = {name: value for name, value in sums.items() if is_count(name)}
    means = dict(counts)
    for name, value in sums.items():
        if name in counts:
            continue
        if name.startswith(("min_", "max_")) or name == "router_loss":
            means[name] = value
            continue
        if name in OVER_TOKENS or name.startswith(("policy/", "val/")):
            count = counts["num_target_tokens"]
        elif "num_desirable" in counts and name.endswith(("/chosen", "/rejected")):
            count = counts[f"num_{'un' * name.endswith('rejected')}desirable"]
        elif name in ("logits/chosen", "logits/rejected"):
            count = counts[f"num_{name.removeprefix('logits/')}_tokens"]
        elif name in ("rewards/accuracies", "accuracy", "margin"):
            count = counts["num_pairs"] - counts["num_ties"]
        else:
            count = counts["num_pairs"]
        means[name] = value / count.clamp(min=1)
    return means
