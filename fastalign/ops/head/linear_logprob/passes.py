"""What `fused_linear_loss` needs of a head: one process's, or one rank's share of it."""

from typing import Protocol

from torch import Tensor

from fastalign.ops.head.buffers import Buffers
from fastalign.ops.head.head_tile import RowStatistics
from fastalign.ops.head.linear_logprob.operands import Gradients, HeadInputs


class HeadPasses(Protocol):
    """The two passes over a chunk of rows: the module `chunked`, or a `ShardPass`."""

    def forward(
        self,
        head: HeadInputs,
        buffers: Buffers,
        *,
        kept: Tensor | None = None,
        direction: Tensor | None = None,
        with_entropy: bool = True,
    ) -> RowStatistics:
        """See `chunked.forward`."""

    def backward(
        self,
        head: HeadInputs,
        buffers: Buffers,
        gradients: Gradients,
        grad_logprob: Tensor,
        *,
        grad_entropy: Tensor | None = None,
        kept: Tensor | None = None,
        direction: Tensor | None = None,
    ) -> None:
        """See `chunked.backward`, for the rows of the last forward."""
