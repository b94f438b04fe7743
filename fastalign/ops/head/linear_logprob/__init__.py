"""Log-probs of target tokens from hidden states, without materialising the logits."""

from fastalign.ops.head.linear_logprob.api import linear_logprob

__all__ = ["linear_logprob"]
