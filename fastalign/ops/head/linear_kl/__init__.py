"""`linear_kl`: two heads' log-probs and their KL, without materialising the logits."""

from fastalign.ops.head.linear_kl.api import LinearKL, linear_kl

__all__ = ["LinearKL", "linear_kl"]
