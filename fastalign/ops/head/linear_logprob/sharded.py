"""`linear_logprob` where a process group shares the vocabulary: its autograd, in eager PyTorch.

Legend: T rows, V this rank's columns, D hidden, K kept rows.
"""

from typing import Any

import torch
from torch import Tensor

from fastalign.ops.head.buffers import Buffers, plan_buffers
from fastalign.ops.head.head_tile import SoftmaxStatistics
from fastalign.ops.head.linear_head import lora_operands
from fastalign.ops.head.linear_logprob.operands import new_gradients
from fastalign.ops.head.linear_logprob.shard_arguments import CheckedHead, ShardedHead, checked_head
from fastalign.ops.head.linear_logprob.shard_pass import ShardPass
from fastalign.ops.head.products import accumulation_dtype


@torch.compiler.disable(reason="vocabulary_shard: ranks communicate in eager PyTorch")  # type: ignore[untyped-decorator, no-untyped-call]
def linear_logprob(head: ShardedHead, return_entropy: bool) -> tuple[Tensor, Tensor]:
    """Log-probs (T,) and entropies (T,), zeros where not asked for.

    Raises:
        ValueError: As the public function, on every rank.
    """
    checked = checked_head("linear_logprob", head, lambda: {"return_entropy": return_entropy})
    of_lora = lora_operands(head.lora, head.hidden, head.weight, checked.dtype)
    leaves = (head.hidden, head.weight, head.bias, head.targets, checked.temperature, *of_lora)
    logprob, entropy = _ShardedLogprob.apply(checked, return_entropy, *leaves)  # type: ignore[no-untyped-call]
    return logprob, entropy


def _buffers(
    head: CheckedHead, hidden: Tensor, weight: Tensor, return_entropy: bool
) -> tuple[Buffers, int]:
    """Scratch memory, planned for the largest shard, and the number of kept rows."""
    plan = plan_buffers(
        hidden.shape[0],
        head.shard.num_planned_columns,
        head.dtype,
        hidden.device.type,
        head.budget,
        scratch=head.backend == "torch",
        keep=head.needs.kept,
        convert=head.needs.any,
        tile=return_entropy,
    )
    buffers = Buffers(plan, weight.shape[0], head.dtype, hidden.device, head.backend)
    return buffers, plan.kept_rows


class _ShardedLogprob(torch.autograd.Function):
    """Keeps what `fastalign::linear_logprob` does, and each row's softmax over all columns."""

    @staticmethod
    def forward(
        ctx: Any, head: CheckedHead, return_entropy: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        hidden, weight, bias, targets, *rest = tensors
        assert hidden is not None
        assert weight is not None
        assert targets is not None
        with torch.autocast(hidden.device.type, enabled=False):
            buffers, kept_rows = _buffers(head, hidden, weight, return_entropy)
            kept = buffers.new_kept(kept_rows)
            direction = None
            if head.needs.direction:
                dtype = accumulation_dtype(head.dtype)
                direction = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
            passes = ShardPass(head.shard)
            read = passes.forward(
                head.inputs(hidden, weight, bias, targets, *rest),
                buffers,
                kept=kept,
                direction=direction,
                with_entropy=return_entropy,
            )
        assert passes.known is not None
        known = (passes.known.maximum, passes.known.log_total, passes.known.entropy)
        ctx.save_for_backward(*tensors, kept, direction, *known)
        ctx.head, ctx.return_entropy = head, return_entropy
        ctx.set_materialize_grads(False)
        return read.logprob, read.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> Any:
        if grad_logprob is None:
            if grad_entropy is None:
                return (None,) * 9
            grad_logprob = torch.zeros_like(grad_entropy)
        head: CheckedHead = ctx.head
        *tensors, kept, direction, maximum, log_total, entropy = ctx.saved_tensors
        hidden, weight, *_, lora_hidden, lora_weight = tensors
        with torch.autocast(hidden.device.type, enabled=False):
            buffers, _ = _buffers(head, hidden, weight, ctx.return_entropy)
            gradients = new_gradients(
                head.needs, hidden, weight, lora_hidden, lora_weight, head.dtype
            )
            ShardPass(head.shard, SoftmaxStatistics(maximum, log_total, entropy)).backward(
                head.inputs(*tensors),
                buffers,
                gradients,
                grad_logprob,
                grad_entropy=grad_entropy,
                kept=kept,
                direction=direction,
            )
        leaves = (*tensors[:3], lora_hidden, lora_weight)
        cast = [
            None if gradient is None else gradient.to(leaf.dtype)
            for gradient, leaf in zip(gradients.all, leaves, strict=True)
        ]
        return (None, None, *cast[:3], None, None, *cast[3:])
