"""`token_logprob`: logits to the log-probs of given tokens, and the entropy."""

from fastalign.ops.token_logprob.api import token_logprob

__all__ = ["token_logprob"]
