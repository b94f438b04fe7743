"""`token_kl`: the KL divergence of two models' next-token distributions, from their logits."""

from fastalign.ops.token_kl.api import KLDirection, token_kl

__all__ = ["KLDirection", "token_kl"]
