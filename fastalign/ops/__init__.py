"""Operations on logits and hidden states; each is one function with explicit backends."""

from fastalign.ops.fused_linear_loss import LossFunction, TokenChunk, fused_linear_loss
from fastalign.ops.linear_logprob import linear_logprob
from fastalign.ops.lora import LoraWeights
from fastalign.ops.preference_loss import PreferenceFormula, preference_loss
from fastalign.ops.token_logprob import token_logprob

__all__ = [
    "LoraWeights",
    "LossFunction",
    "PreferenceFormula",
    "TokenChunk",
    "fused_linear_loss",
    "linear_logprob",
    "preference_loss",
    "token_logprob",
]
