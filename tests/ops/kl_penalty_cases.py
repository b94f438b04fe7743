"""Inputs of `kl_penalty`, and the docstring's lines, for its tests here and on a GPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops import KLPenalty, kl_penalty
from tests.ops.packed_cases import bounds_of, normal

ESTIMATORS = ["k1", "k2", "k3"]


@dataclass(frozen=True)
class Inputs:
    logprob: Tensor
    reference_logprob: Tensor
    bounds: Tensor
    score: Tensor | None
    coefficient: float | Tensor
    mask: Tensor | None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Inputs":
        def moved(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else None)

        return Inputs(**{name: moved(value) for name, value in vars(self).items()})


def inputs(lengths: list[int], *, everything: bool = True) -> Inputs:
    """Scores and a mask where `everything` is asked for; every response with tokens keeps one."""
    num_tokens = sum(lengths)
    logprob = -normal(num_tokens, 1, 3.0).abs()
    bounds = bounds_of(lengths)
    mask = torch.arange(num_tokens) % 3 != 1
    mask[bounds[:-1][bounds.diff() > 0]] = True
    return Inputs(
        logprob,
        logprob - normal(num_tokens, 2),
        bounds,
        normal(len(lengths), 3) if everything and 0 not in lengths else None,
        torch.tensor(0.07) if everything else 0.05,
        mask if everything else None,
    )


def plain(given: Inputs, estimator: str, leaf: Tensor) -> KLPenalty:
    """The lines in the docstring."""
    x = leaf - given.reference_logprob
    y = x.clamp(min=-20)
    kl = {"k1": x, "k2": x**2 / 2, "k3": (torch.expm1(-y) + y).clamp(max=10.0)}[estimator]
    if given.mask is not None:
        kl = torch.where(given.mask, kl, 0.0)
    pairs = list(zip(given.bounds.tolist(), given.bounds.tolist()[1:], strict=False))
    sums = [kl[begin:end].sum() for begin, end in pairs]
    sequence_kl = torch.stack(sums) if sums else kl[:0]
    reward = -given.coefficient * kl.detach()
    for response, (begin, end) in enumerate(pairs):
        if given.score is not None:
            counted = [t for t in range(begin, end) if given.mask is None or given.mask[t]]
            reward[counted[-1]] += given.score[response]
    return KLPenalty(reward, kl, sequence_kl)


def run(given: Inputs, estimator: str, backend: str | None) -> dict[str, Tensor]:
    """Values and the gradient, through one part's weights each; None: the docstring's lines."""
    leaf = given.logprob.clone().requires_grad_()
    if backend is None:
        found = plain(given, estimator, leaf)
    else:
        arguments = {**vars(given), "logprob": leaf, "estimator": estimator, "backend": backend}
        found = kl_penalty(**arguments)
    assert not found.reward.requires_grad
    token_weight = torch.linspace(-1, 1, len(found.kl)).to(found.kl)
    weight = torch.linspace(1, 2, len(found.sequence_kl)).to(found.kl)
    ((found.kl * token_weight).sum() + (found.sequence_kl * weight).sum()).backward()
    assert leaf.grad is not None
    results = {name: value.detach() for name, value in found._asdict().items()}
    return {**results, "gradient": leaf.grad}
