"""Operations on logits and hidden states; each is one function with explicit backends."""

from fastalign.ops.gae import gae
from fastalign.ops.head.fused_linear_loss import LossFunction, TokenChunk, fused_linear_loss
from fastalign.ops.head.linear_head import LinearHead, LoraWeights
from fastalign.ops.head.linear_jsd import generalised_jsd, linear_jsd
from fastalign.ops.head.linear_kl import LinearKL, linear_kl
from fastalign.ops.head.linear_logprob import linear_logprob
from fastalign.ops.head.logsumexp import linear_logsumexp
from fastalign.ops.head.vocabulary_shard import VocabularyShard
from fastalign.ops.kl_penalty import KLPenalty, kl_penalty
from fastalign.ops.preference_loss import PreferenceFormula, preference_loss
from fastalign.ops.token_kl import token_kl
from fastalign.ops.token_logprob import token_logprob

__all__ = [
    "KLPenalty",
    "LinearHead",
    "LinearKL",
    "LoraWeights",
    "LossFunction",
    "PreferenceFormula",
    "TokenChunk",
    "VocabularyShard",
    "fused_linear_loss",
    "gae",
    "generalised_jsd",
    "kl_penalty",
    "linear_jsd",
    "linear_kl",
    "linear_logprob",
    "linear_logsumexp",
    "preference_loss",
    "token_kl",
    "token_logprob",
]
