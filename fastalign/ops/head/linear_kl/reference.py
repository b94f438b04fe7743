"""The definition of `linear_kl`, with all the logits: eager and differentiable.

Legend: T rows, V vocabulary.
"""

from torch import Tensor

from fastalign.ops.head.kl_tile import PairStatistics
from fastalign.ops.head.linear_logprob.reference import row_statistics
from fastalign.ops.token_kl.reference import divergence


def pair_statistics(
    logits: Tensor,  # (T, V)
    reference_logits: Tensor,  # (T, V)
    targets: Tensor,  # (T,) int64
    ignore_index: int,
    over_reference: bool,
) -> PairStatistics:
    """Return both log-probs, the policy's entropy and the KL; zeros where ignored."""
    logprob, entropy, _ = row_statistics(logits, targets, ignore_index)
    reference_logprob, _, _ = row_statistics(reference_logits, targets, ignore_index)
    log_p, log_q = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    kl = divergence(log_p, log_q, over_reference, targets == ignore_index)
    return PairStatistics(logprob, reference_logprob, entropy, kl)
