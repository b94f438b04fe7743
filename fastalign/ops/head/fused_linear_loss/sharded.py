"""`fused_linear_loss` where a process group shares the vocabulary.

The sweep over chunks is that of one process; every rank plans the same chunks, from the largest
shard, and calls the loss on the same log-probs.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.head.buffers import Buffers
from fastalign.ops.head.fused_linear_loss import chunked
from fastalign.ops.head.fused_linear_loss.chunk import LossFunction
from fastalign.ops.head.linear_head import lora_operands
from fastalign.ops.head.linear_logprob.shard_arguments import ShardedHead, checked_head
from fastalign.ops.head.linear_logprob.shard_pass import ShardPass


@dataclass(frozen=True)
class ShardBudget(chunked.Budget):
    """Plans for the largest shard's columns, and makes buffers for this one's."""

    columns_here: int

    def buffers(self, num_rows: int) -> tuple[Buffers, Tensor]:
        """Scratch memory for a chunk, and a place for its brackets."""
        plan = self.plan(num_rows)
        buffers = Buffers(plan, self.columns_here, self.compute_dtype, self.device, self.backend)
        return buffers, buffers.new_kept(plan.kept_rows)


@torch.compiler.disable(reason="vocabulary_shard: ranks communicate in eager PyTorch")  # type: ignore[untyped-decorator, no-untyped-call]
def fused_linear_loss(
    head: ShardedHead, read_bounds: Callable[[], list[int] | None], loss_fn: LossFunction
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss () and metrics; `read_bounds` checks the groups' bounds and returns them.

    Raises:
        ValueError: As the public function, on every rank.
    """
    bounds: list[int] | None = None

    def more() -> dict[str, Any]:
        nonlocal bounds
        bounds = read_bounds()
        if bounds is None:
            return {"segments": "None"}
        checksum = zlib.crc32(repr(bounds).encode())
        return {"segments": f"{len(bounds)} bounds with checksum {checksum:08x}"}

    checked = checked_head("fused_linear_loss", head, more)
    of_lora = lora_operands(head.lora, head.hidden, head.weight, checked.dtype)
    leaves = (head.hidden, head.weight, head.bias, *of_lora)
    with torch.no_grad():
        inputs = checked.inputs(*leaves[:3], head.targets, checked.temperature, *of_lora)
    budget = ShardBudget(
        head.shard.num_planned_columns,
        checked.dtype,
        head.hidden.device,
        checked.budget,
        checked.needs,
        checked.backend,
        head.weight.shape[0],
    )
    return chunked.forward(inputs, bounds, loss_fn, budget, leaves, ShardPass(head.shard))
