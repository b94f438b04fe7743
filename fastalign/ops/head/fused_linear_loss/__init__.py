"""Any loss of a head's per-token log-probs, with its gradient computed in the forward."""

from fastalign.ops.head.fused_linear_loss.api import fused_linear_loss
from fastalign.ops.head.fused_linear_loss.chunk import LossFunction, TokenChunk

__all__ = ["LossFunction", "TokenChunk", "fused_linear_loss"]
