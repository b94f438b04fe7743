"""The definition of `preference_loss`, in PyTorch and differentiated by autograd."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastalign.ops.preference_loss.formula import PreferenceFormula
from fastalign.ops.preference_loss.pairs import PairLogprobs
from fastalign.ops.segments import segment_sum


class Inputs(NamedTuple):
    """The arguments of `preference_loss`, as the kernels take them."""

    logprob: Tensor  # (N,)
    bounds: Tensor  # (2B + 1,)
    reference_logprob: Tensor | None  # (2B,)
    length: Tensor | None  # (2B,)
    tie: Tensor | None  # (B,) bool
    link: int
    per_token: bool
    numbers: Sequence[float]
    backend: str


def forward(
    logprob: Tensor,  # (N,)
    bounds: Tensor,  # (2B + 1,)
    formula: PreferenceFormula,
    reference_logprob: Tensor | None,  # (2B,)
    length: Tensor | None,  # (2B,)
    tie: Tensor | None,  # (B,)
) -> tuple[Tensor, Tensor]:  # (B,), (2B,)
    """Return losses and sequence log-probs, in the dtype of `logprob`."""
    sequence_logprob = segment_sum(logprob, bounds)
    pairs = PairLogprobs.from_responses(
        sequence_logprob,
        None if reference_logprob is None else reference_logprob.to(logprob.dtype),
        bounds.diff() if length is None else length,
        tie,
    )
    return formula(pairs), sequence_logprob
