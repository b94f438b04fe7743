"""`kl_penalty`: KL estimates per token and the shaped reward of PPO, over packed responses."""

from fastalign.ops.kl_penalty.api import KLPenalty, kl_penalty

__all__ = ["KLPenalty", "kl_penalty"]
