"""The loss of supervised fine-tuning, per token."""

from torch import Tensor


def negative_logprob(logprob: Tensor) -> Tensor:
    """-log p, (N,): the cross-entropy of each target token, unreduced.

    Divide the sum by the number of target tokens of the whole batch, not of a micro-batch.
    """
    return -logprob
