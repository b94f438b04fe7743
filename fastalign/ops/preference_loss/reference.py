"""The definition of `preference_loss`, in PyTorch and differentiated by autograd."""

from torch import Tensor

from fastalign.ops.preference_loss.formula import PreferenceFormula
from fastalign.ops.preference_loss.pairs import PairLogprobs
from fastalign.ops.segments import segment_sum


def define(
    logprob: Tensor,  # (N,)
    bounds: Tensor,  # (2B + 1,)
    formula: PreferenceFormula,
    reference_logprob: Tensor | None,  # (2B,)
    length: Tensor | None,  # (2B,)
    tie: Tensor | None,  # (B,)
) -> tuple[Tensor, Tensor]:  # (B,), (2B,)
    """Losses and sequence log-probs, in the dtype of `logprob`."""
    sequence_logprob = segment_sum(logprob, bounds)
    pairs = PairLogprobs.from_responses(
        sequence_logprob,
        None if reference_logprob is None else reference_logprob.to(logprob.dtype),
        bounds.diff() if length is None else length,
        tie,
    )
    return formula(pairs), sequence_logprob
