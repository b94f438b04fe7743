"""What one pass over two heads reads.

Legend: N rows, V vocabulary, D and E hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops.head.kl_tile import PairStatistics, Upstream, read_pair
from fastalign.ops.head.linear_kl.buffers import PairBuffers
from fastalign.ops.head.linear_logprob.operands import HeadInputs, head_inputs
from fastalign.ops.head.products import accumulation_dtype, operand, project


@dataclass(frozen=True)
class HeadPair:
    """The operands of both heads: the same targets, ignored rows and transform."""

    policy: HeadInputs
    reference: HeadInputs
    over_reference: bool

    def rows(self, start: int, stop: int) -> "HeadPair":
        """The same heads on rows start..stop."""
        policy, reference = self.policy.rows(start, stop), self.reference.rows(start, stop)
        return HeadPair(policy, reference, self.over_reference)

    def project(self, tiles: Tensor) -> None:
        """Writes both heads' products into tiles (2, n, V)."""
        for head, tile in zip((self.policy, self.reference), tiles, strict=True):
            project(head.hidden, head.weight, head.bias, out=tile)

    def read(
        self,
        tiles: Tensor,
        buffers: PairBuffers,
        *,
        brackets: Tensor | None = None,
        gradient: Tensor | None = None,
        upstream: Upstream | None = None,
    ) -> PairStatistics:
        """One pass over tiles (2, n, V): see `kl_tile.read_pair`."""
        head = self.policy
        return read_pair(
            tiles,
            head.targets,
            head.ignored,
            head.transform,
            self.over_reference,
            buffers.backend,
            buffers.scratch,
            brackets=brackets,
            gradient=gradient,
            upstream=upstream,
        )


def head_pair(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    over_reference: bool,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
) -> HeadPair:
    """The operands of one call, rounded to `compute_dtype`; a weight that both share, once."""
    numbers = (softcap, logit_scale, ignore_index, compute_dtype)
    policy = head_inputs(hidden, weight, bias, targets, temperature, *numbers)
    shared = reference_weight.is_set_to(weight)
    reference = HeadInputs(
        operand(reference_hidden, compute_dtype),
        policy.weight if shared else operand(reference_weight, compute_dtype),
        None if reference_bias is None else reference_bias.to(accumulation_dtype(compute_dtype)),
        policy.targets,
        policy.ignored,
        policy.transform,
    )
    return HeadPair(policy, reference, over_reference)
