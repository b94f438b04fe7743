"""Formulas, pairs and eager lines for the tests of `preference_loss`."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastalign import losses
from fastalign.ops import PreferenceFormula, preference_loss
from fastalign.ops.preference_loss.pairs import PairLogprobs

FORMULAS: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.3},
    "dpo_label_smoothed": {"beta": 0.3, "label_smoothing": 0.2},
    "dpo_robust": {"beta": 0.3, "label_smoothing": 0.2},
    "hinge": {"beta": 0.3},
    "ipo_sum": {"beta": 0.3},
    "ipo_mean": {"beta": 0.7},
    "dpo_length_normalised": {"beta": 4.0},
    "dpo_length_penalised": {"beta": 0.3, "alpha": 0.02},
    "simpo": {"beta": 2.5, "gamma": 0.4},
    "orpo": {"beta": 0.3},
    "cpo": {"beta": 0.3, "nll_coefficient": 0.7},
    "dpo_rao_kupper": {"beta": 0.3, "nu": 2.5},
    "dpo_davidson": {"beta": 0.3, "nu": 1.7},
}
WITH_TIES = ("dpo_rao_kupper", "dpo_davidson")
# One pair; pairs with an empty side; odd sizes, long ones, none that begins at a multiple of four.
ALL_BOUNDS = {
    "one": [0, 1, 2],
    "uneven": [0, 3, 10, 27, 30, 31, 1286, 1289, 3411],
    "empty": [0, 0, 5, 9, 9, 9, 9, 11, 12],
    "none": [0],
}
Results = tuple[Tensor, Tensor, Tensor]


def make(name: str) -> PreferenceFormula:
    return losses.formula(getattr(losses, name), **FORMULAS[name])


@dataclass(frozen=True)
class Pairs:
    """What `preference_loss` takes for one formula."""

    logprob: Tensor
    bounds: Tensor
    reference_logprob: Tensor | None
    tie: Tensor | None

    def to(self, device: str) -> "Pairs":
        reference, tie = self.reference_logprob, self.tie
        return Pairs(
            self.logprob.to(device),
            self.bounds.to(device),
            None if reference is None else reference.to(device),
            None if tie is None else tie.to(device),
        )


def inputs(name: str, bounds: list[int], ties: bool = False) -> Pairs:
    """Log-probs of tokens around -0.5, and references within a few nats of their sums."""
    generator = torch.Generator().manual_seed(len(bounds))
    logprob = -torch.rand(bounds[-1], generator=generator)
    reference = None
    if make(name).needs_reference:
        noise = 3 * torch.randn(len(bounds) - 1, generator=generator)
        reference = sums_of(logprob, bounds) + noise
    tie = torch.arange(len(bounds) // 2) % 2 == 0 if ties else None
    return Pairs(logprob, torch.tensor(bounds), reference, tie)


def sums_of(logprob: Tensor, bounds: list[int]) -> Tensor:
    parts = [logprob[start:stop].double().sum() for start, stop in pairwise(bounds)]
    return torch.stack(parts).to(logprob.dtype) if parts else logprob[:0]


def weighted(found: tuple[Tensor, Tensor], leaf: Tensor) -> Results:
    """Both results, and the gradient of a sum that weights each."""
    value, sequence_logprob = found
    weights = torch.linspace(-1, 2.3, len(value), dtype=value.dtype, device=value.device)
    others = torch.linspace(0.1, 0.3, len(sequence_logprob), dtype=value.dtype, device=value.device)
    ((value * weights).sum() + (sequence_logprob * others).sum()).backward()
    assert leaf.grad is not None
    return value.detach().cpu(), sequence_logprob.detach().cpu(), leaf.grad.cpu()


def run(name: str, pairs: Pairs, backend: str, length: Tensor | None = None) -> Results:
    leaf = pairs.logprob.detach().requires_grad_()
    found = preference_loss(
        leaf,
        pairs.bounds,
        make(name),
        pairs.reference_logprob,
        length=length,
        tie=pairs.tie,
        backend=backend,  # type: ignore[arg-type]
    )
    return weighted(found, leaf)


def eager(name: str, pairs: Pairs, dtype: torch.dtype) -> Results:
    """Sums of slices, and the function of `losses` on them, differentiated by autograd."""
    leaf = pairs.logprob.detach().to(dtype).requires_grad_()
    bounds, reference = pairs.bounds.tolist(), pairs.reference_logprob
    sums = sums_of(leaf, bounds)
    made = PairLogprobs.from_responses(
        sums, None if reference is None else reference.to(dtype), pairs.bounds.diff(), pairs.tie
    )
    function = getattr(losses, name)
    arguments = (getattr(made, field) for field in make(name).inputs)
    return weighted((function(*arguments, **FORMULAS[name]), sums), leaf)
