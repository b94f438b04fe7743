"""Operations on logits and hidden states; each is one function with explicit backends."""

from fastalign.ops.fused_linear_loss import LossFunction, TokenChunk, fused_linear_loss
from fastalign.ops.linear_kl import LinearKL, linear_kl
from fastalign.ops.linear_logprob import linear_logprob
from fastalign.ops.token_kl import token_kl
from fastalign.ops.token_logprob import token_logprob

__all__ = [
    "LinearKL",
    "LossFunction",
    "TokenChunk",
    "fused_linear_loss",
    "linear_kl",
    "linear_logprob",
    "token_kl",
    "token_logprob",
]
