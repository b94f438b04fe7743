"""A reward model's head with ties that is fitted while people label, and what it would ask next.

The reward difference of a pair is d = s r + w . x: r the difference under the model's own head, x
the difference of frozen hidden states (`PairFeatures`). The outcomes of d are Rao and Kupper's. The
loss is the cross-entropy of the votes, with the priors w ~ N(anchor, tau^2) and s ~ N(1, 1).
"""

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalign.compare.features import PairFeatures
from fastalign.evaluation.statistics import estimate, share_interval
from fastalign.losses.reward import rao_kupper_outcomes, rao_kupper_votes

NUM_FOLDS = 5
NUM_MEMBERS = 8
TAUS = (1.0, 3.0, 10.0)
NU = 1.5
MAX_ITERATIONS = 60
# Of the posterior's logarithm, in units of the priors' deviations, whose curvature is at least 1:
# each parameter is within this share of its own deviation.
GRADIENT_TOLERANCE = 1e-2
# Fewer labels give no held-out accuracy that could be shown.
LEAST_LABELS = 20
# More labels are not needed once they would raise the log-likelihood by less than this, in nats.
ENOUGH = 0.01


@dataclass(frozen=True)
class Labels:
    """L pairs with votes.

    Attributes:
        places: (L,) int64, places of the pairs in `PairFeatures`.
        votes: (L, 3) float64, votes for a, for b, and for a tie.
        random: (L,) bool, pairs that were not chosen by the model.
    """

    places: Tensor
    votes: Tensor
    random: Tensor

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.places)

    def at(self, index: Tensor) -> "Labels":
        """Return the pairs at an index, (L,) bool or int64."""
        return Labels(self.places[index], self.votes[index], self.random[index])


@dataclass(frozen=True)
class Head:
    """A fitted head: weight (K,), scale of the model's own reward, and nu."""

    weight: Tensor
    scale: Tensor
    nu: Tensor

    def difference(self, features: PairFeatures, places: Tensor | None = None) -> Tensor:
        """Return reward differences (L,) of the pairs at these places; None: of all."""
        x, r = features.difference, features.reward
        if places is not None:
            x, r = x[places], r[places]
        return torch.mv(x, self.weight) + self.scale * r

    def outcomes(self, features: PairFeatures, places: Tensor | None = None) -> Tensor:
        """Return log-probabilities (L, 3) that a wins, that b wins, and of a tie."""
        return rao_kupper_outcomes(self.difference(features, places), nu=self.nu)


@dataclass(frozen=True)
class HeadFit:
    """Result of a fit.

    Attributes:
        head: fitted on all labels.
        informative: (N,) float64, for each pair what its label would be worth.
        measures: `num_labels`, `seconds`, held-out measures, and `labels_needed`, as JSON has them.
    """

    head: Head
    informative: Tensor
    measures: dict[str, Any]


def labels_of(features: PairFeatures, counts: Mapping[int, tuple[Sequence[int], bool]]) -> Labels:
    """Return the labels of `counts`: by pair its votes for a, b and a tie, and if it was random."""
    known = {pair: place for place, pair in enumerate(features.ids)}
    rows = [(known[pair], *found) for pair, found in counts.items() if pair in known]
    return Labels(
        torch.tensor([place for place, _, _ in rows], dtype=torch.long),
        torch.tensor([list(votes) for _, votes, _ in rows], dtype=torch.float64).view(-1, 3),
        torch.tensor([random for _, _, random in rows], dtype=torch.bool),
    )


def fit_heads(
    features: PairFeatures, labels: Labels, taus: Tensor, anchors: Tensor, weights: Tensor
) -> list[Head]:
    """Fit P heads to the votes, side by side.

    Args:
        features: all pairs.
        labels: L pairs with votes.
        taus: (P,) standard deviation of the prior of each weight.
        anchors: (P, K) mean of the prior.
        weights: (P, L) how often each label counts; 0 leaves it out.
    """
    x, r = features.difference[labels.places], features.reward[labels.places]
    total = labels.votes.sum(1)
    shares = (labels.votes / total[:, None]).expand(len(taus), -1, -1).flatten(0, 1)
    counts = weights * total
    prior = torch.full_like(taus, math.log((features.nu or NU) - 1.0))
    # In units of tau, so that one step length suits all three parts.
    offset, scale = torch.zeros_like(anchors), torch.ones_like(taus)
    log_excess = prior.clone()  # of nu over 1
    parameters = [offset, scale, log_excess]
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=MAX_ITERATIONS,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        difference = (anchors + taus[:, None] * offset) @ x.T + scale[:, None] * r
        nu = (1.0 + log_excess.exp())[:, None].expand_as(difference)
        each = rao_kupper_votes(difference.flatten(), shares, nu=nu.flatten())
        loss = (counts.flatten() * each).sum()
        priors = offset.square().sum() + (scale - 1.0).square().sum()
        loss = loss + (priors + (log_excess - prior).square().sum()) / 2
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    found = anchors + taus[:, None] * offset.detach()
    nus = 1.0 + log_excess.detach().exp()
    return [Head(*parts) for parts in zip(found, scale.detach(), nus, strict=True)]


def fit_head(features: PairFeatures, labels: Labels, *, tau: float) -> Head:
    """Fit one head to all votes, around 0."""
    anchors = torch.zeros(1, features.difference.shape[1], dtype=torch.float64)
    taus = torch.tensor([tau], dtype=torch.float64)
    weights = torch.ones(1, len(labels), dtype=torch.float64)
    return fit_heads(features, labels, taus, anchors, weights)[0]


def folds_of(features: PairFeatures, labels: Labels) -> Tensor:
    """Return the fold (L,) of each label; pairs of one prompt are in one fold."""
    prompts = torch.tensor(features.prompts, dtype=torch.long)[labels.places]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(int(max(features.prompts, default=0)) + 1, generator=generator)
    return order[prompts] % NUM_FOLDS


def held_out_outcomes(
    features: PairFeatures, labels: Labels, cases: Sequence[tuple[float, float]]
) -> list[Tensor]:
    """Return outcomes (L, 3) of each label by a head that was fitted without its fold.

    Each of the `cases` is a tau and a share: the heads are fitted on the first share of the other
    folds' labels, in a random order.
    """
    folds = folds_of(features, labels)
    generator = torch.Generator().manual_seed(0)
    weights = torch.zeros(len(cases), NUM_FOLDS, len(labels), dtype=torch.float64)
    for fold in range(NUM_FOLDS):
        others = (folds != fold).nonzero().flatten()
        others = others[torch.randperm(len(others), generator=generator)]
        for case, (_, share) in enumerate(cases):
            weights[case, fold, others[: math.ceil(share * len(others))]] = 1.0
    taus = torch.tensor([tau for tau, _ in cases], dtype=torch.float64)
    taus = taus.repeat_interleave(NUM_FOLDS)
    anchors = torch.zeros(len(taus), features.difference.shape[1], dtype=torch.float64)
    heads = fit_heads(features, labels, taus, anchors, weights.flatten(0, 1))
    found = []
    for case in range(len(cases)):
        outcomes = torch.empty(len(labels), 3, dtype=torch.float64)
        for fold, head in enumerate(heads[case * NUM_FOLDS :][:NUM_FOLDS]):
            outcomes[folds == fold] = head.outcomes(features, labels.places[folds == fold])
        found.append(outcomes)
    return found


def log_likelihood(outcomes: Tensor, labels: Labels) -> Tensor:
    """Return the mean log-likelihood (L,) of each label's votes."""
    return (outcomes * labels.votes).sum(1) / labels.votes.sum(1)


def held_out_accuracy(features: PairFeatures, outcomes: Tensor, labels: Labels) -> dict[str, Any]:
    """Return the accuracy on pairs drawn at random that are no ties, and its 95 % interval.

    Pairs that the model chose are those that it finds hard: on them it is worse than on all.
    """
    margin = labels.votes[:, 0] - labels.votes[:, 1]
    chosen = labels.random & (margin != 0) & (labels.votes[:, :2].amax(1) > labels.votes[:, 2])
    difference = outcomes[:, 0] - outcomes[:, 1]
    hits = ((difference > 0) == (margin > 0)).double()
    prompts = torch.tensor(features.prompts)[labels.places]
    groups: dict[int, list[float]] = defaultdict(list)
    for prompt, hit in zip(prompts[chosen].tolist(), hits[chosen].tolist(), strict=True):
        groups[prompt].append(hit)
    count = int(chosen.sum())
    if not count:
        return {"accuracy": None, "accuracy_count": 0}
    interval = share_interval(list(groups.values()))
    return {
        "accuracy": hits[chosen].mean().item(),
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "accuracy_count": count,
    }


def labels_needed(features: PairFeatures, labels: Labels, tau: float, now: float) -> int | None:
    """Return about how many more labels are needed until they change little; None: unknown.

    The held-out log-likelihood of n labels is taken as c - b / n, as for a model that can be right
    (b is half the number of its parameters, Akaike 1974), b by least squares over a quarter, a half
    and all of the labels; `now` is that of all. Enough is where b / n falls below ENOUGH.
    """
    shares = (0.25, 0.5)
    held_out = held_out_outcomes(features, labels, [(tau, share) for share in shares])
    likely = [log_likelihood(outcomes, labels).mean().item() for outcomes in held_out]
    points = [*zip(shares, likely, strict=True), (1.0, now)]
    num_fitted = len(labels) * (1 - 1 / NUM_FOLDS)
    inverse = [1.0 / (share * num_fitted) for share, _ in points]
    mean_x = math.fsum(inverse) / len(inverse)
    mean_y = math.fsum(y for _, y in points) / len(points)
    covariance = math.fsum(
        (x - mean_x) * (y - mean_y) for x, (_, y) in zip(inverse, points, strict=True)
    )
    slope = -covariance / math.fsum((x - mean_x) ** 2 for x in inverse)
    if slope <= 0:
        return None
    return max(0, math.ceil(slope / ENOUGH) - len(labels))


def committee(features: PairFeatures, labels: Labels, tau: float, seed: int) -> list[Head]:
    """Return heads that differ as much as the labels leave open.

    Each is fitted around an anchor drawn from the prior (Pearce et al., arXiv 1810.05546), to the
    labels with Poisson(1) weights, an online bootstrap.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_MEMBERS, features.difference.shape[1])
    anchors = tau * torch.randn(shape, generator=generator, dtype=torch.float64)
    ones = torch.ones(NUM_MEMBERS, len(labels), dtype=torch.float64)
    taus = torch.full((NUM_MEMBERS,), tau, dtype=torch.float64)
    return fit_heads(features, labels, taus, anchors, torch.poisson(ones, generator=generator))


def informative(features: PairFeatures, heads: Sequence[Head]) -> Tensor:
    """Return (N,): the entropy of the mean outcomes times the dissent of the heads, in nats^2.

    The dissent is the mean Kullback-Leibler divergence of the heads' outcomes to their mean, the
    mutual information of label and head (Houlsby et al., arXiv 1112.5745).
    """
    each = torch.stack([head.outcomes(features) for head in heads])  # (members, N, 3)
    mean = torch.logsumexp(each, dim=0) - math.log(len(heads))
    entropy = -(mean.exp() * mean).sum(-1)
    dissent = (each.exp() * (each - mean)).sum(-1).mean(0)
    return entropy * dissent.clamp(min=0.0)


def fit_all(features: PairFeatures, labels: Labels, seed: int = 0) -> HeadFit:
    """Choose tau by held-out likelihood, fit the head and a committee, and measure them."""
    begin = time.perf_counter()
    measures: dict[str, Any] = {"num_labels": len(labels)}
    tau = TAUS[0]
    if len(labels) >= LEAST_LABELS:
        held_out = held_out_outcomes(features, labels, [(t, 1.0) for t in TAUS])
        tried = dict(zip(TAUS, held_out, strict=True))
        likely = {t: log_likelihood(found, labels) for t, found in tried.items()}
        tau = max(TAUS, key=lambda t: likely[t].mean().item())
        value = estimate(likely[tau].tolist())
        measures |= held_out_accuracy(features, tried[tau], labels)
        measures |= {"log_likelihood": value.mean, "log_likelihood_se": value.standard_error}
        measures["labels_needed"] = labels_needed(features, labels, tau, value.mean)
    head = fit_head(features, labels, tau=tau)
    score = informative(features, committee(features, labels, tau, seed))
    measures |= {"tau": tau, "nu": head.nu.item(), "seconds": time.perf_counter() - begin}
    return HeadFit(head, score, measures)


def ranking(features: PairFeatures, score: Tensor, labelled: Sequence[int]) -> list[int]:
    """Return the pairs' ids in the order in which they are asked about, spread over prompts.

    A pair's score is divided by one more than the number of its prompt's labelled pairs and of its
    better pairs.
    """
    prompt_of = dict(zip(features.ids, features.prompts, strict=True))
    taken: dict[int, int] = defaultdict(int)
    for pair in labelled:
        if pair in prompt_of:
            taken[prompt_of[pair]] += 1
    done = set(labelled)
    ordered = sorted(
        zip(score.tolist(), features.ids, strict=True), key=lambda item: (-item[0], item[1])
    )
    found = []
    for value, pair in ordered:
        if pair not in done:
            prompt = prompt_of[pair]
            found.append((value / (1 + taken[prompt]), pair))
            taken[prompt] += 1
    return [pair for _, pair in sorted(found, key=lambda item: (-item[0], item[1]))]
