"""`token_logprob`: log-probs of given tokens, and entropies, from logits."""

from fastalign.ops.token_logprob.api import token_logprob

__all__ = ["token_logprob"]
